// Packed weights to numbers, one block of a row at a time: 64 inputs, or 128 where two share a byte.
//
// Order of lanes: a format of nibbles or of codes for a table is read as words (eight inputs for float32, four for bf16)
// whose codes are peeled off one by one, so vector j holds inputs 8 i + j (bf16: 4 i + j) in lane i. pack() in
// kernels.inc puts activations in the same order. All other formats keep their order.
#pragma once
#include "books.h"
#include "isa.h"
#include "simd.h"

namespace lm {
namespace {

constexpr int64_t kScaleUnit = 32;  // inputs per entry of a row's expanded scales

inline void prefetch(const uint8_t* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#endif
}

// What the sixteen nibbles stand for, before scaling.
alignas(64) constexpr float kE2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
alignas(64) constexpr float kCentred[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
// QLoRA, appendix E; the numbers of bitsandbytes.
alignas(64) constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
template <int F>
inline V nibble_values() {
    return vload(F == LM_FP4 ? kE2m1 : F == LM_NF4 ? kNf4 : kCentred);
}

// Which of the nibbles of a word, from the lowest on, is its input j.
template <int F>
constexpr int nibble_of(int j) {
    return F == LM_NF4 ? j ^ 1 : j;
}

#if defined(LM_AVX512)

// The 128 values of 64 bytes.
template <int F>
inline void nibbles128(const uint8_t* p, V* w) {
    const V table = nibble_values<F>();
    __m512i words = _mm512_loadu_si512(p);  // a permutation looks at the lowest four bits only
    for (int j = 0; j < 8; j++) w[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * nibble_of<F>(j)), table);
}

// e4m3fn bytes as bf16, exactly, NaN included: the upper and the lower byte are looked up by the low seven bits.
// Constant tables, because code that ran at load time would use instructions a machine may lack.
struct Fp8Tables {
    alignas(64) uint8_t high[128] = {}, low[128] = {}, spread[64] = {};
    constexpr Fp8Tables() {
        for (int i = 0; i < 128; i++) {
            const int bits = i == 127 ? 0x7fc0 : bf16_bits(i >> 3, i & 7);
            high[i] = bits >> 8;
            low[i] = bits & 255;
        }
        // So that unpacking within 16-byte lanes, lower halves then upper halves, gives the natural order.
        for (int i = 0; i < 64; i++) spread[i] = i % 16 / 8 * 32 + i / 16 * 8 + i % 8;
    }
    static constexpr int bf16_bits(int exponent, int mantissa) {
        if (exponent) return (exponent + 120) << 7 | mantissa << 4;
        if (!mantissa) return 0;
        const int top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;  // a denormal is its own highest bit times the rest
        return (118 + top) << 7 | (mantissa << (7 - top) & 127);
    }
};
constexpr Fp8Tables kFp8;

inline void fp8_words(const uint8_t* p, __m512i* words) {
    __m512i b = _mm512_permutexvar_epi8(_mm512_load_si512(kFp8.spread), _mm512_loadu_si512(p));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kFp8.high), b, _mm512_load_si512(kFp8.high + 64));
    __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kFp8.low), b, _mm512_load_si512(kFp8.low + 64));
    high = _mm512_ternarylogic_epi64(high, b, _mm512_set1_epi8((char)0x80), 0xf8);  // high | (b & 0x80)
    words[0] = _mm512_unpacklo_epi8(low, high);
    words[1] = _mm512_unpackhi_epi8(low, high);
}

inline V bf16_lanes(__m256i words) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline V load_bf16(const uint8_t* p) { return bf16_lanes(_mm256_loadu_si256((const __m256i*)p)); }
inline V load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline void load_fp8_64(const uint8_t* p, V* w) {
    __m512i words[2];
    fp8_words(p, words);
    for (int i = 0; i < 2; i++) {
        w[2 * i] = bf16_lanes(_mm512_castsi512_si256(words[i]));
        w[2 * i + 1] = bf16_lanes(_mm512_extracti64x4_epi64(words[i], 1));
    }
}

#elif defined(LM_AVX2)

inline __m256 lookup8(__m256i index, V table) {
    __m256 low = _mm256_permutevar8x32_ps(table.a, index), high = _mm256_permutevar8x32_ps(table.b, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
template <int F>
inline void nibbles128(const uint8_t* p, V* w) {
    const V table = nibble_values<F>();
    __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 32));
    for (int j = 0; j < 8; j++) {
        const int shift = 4 * nibble_of<F>(j);
        w[j] = {lookup8(_mm256_srli_epi32(a, shift), table), lookup8(_mm256_srli_epi32(b, shift), table)};
    }
}
inline __m256i bytes8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline __m256 bf16_8(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline V load_bf16(const uint8_t* p) { return {bf16_8(p), bf16_8(p + 16)}; }
inline V load_u8(const uint8_t* p) { return {_mm256_cvtepi32_ps(bytes8(p)), _mm256_cvtepi32_ps(bytes8(p + 8))}; }
// Sign, exponent and mantissa moved into a half's places are the value times 2 ** -8; that also holds for denormals,
// which slow down nothing in halves.
inline V fp8_16(const uint8_t* p) {
    const __m256i up = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 8);
    const __m256i number = _mm256_set1_epi16(0x3f80);
    __m256i half = _mm256_and_si256(_mm256_srai_epi16(up, 1), _mm256_set1_epi16((short)0xbf80));
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, number), number);
    half = _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
    const __m256 by = _mm256_set1_ps(256.0f);
    return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), by),
            _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), by)};
}
inline void load_fp8_64(const uint8_t* p, V* w) {
    for (int i = 0; i < 4; i++) w[i] = fp8_16(p + 16 * i);
}

#else

template <int F>
inline void nibbles128(const uint8_t* p, V* w) {
    const V table = nibble_values<F>();
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 16; i++) w[j].v[i] = table.v[p[4 * i + j / 2] >> (nibble_of<F>(j) % 2 * 4) & 15];
}
inline V load_bf16(const uint8_t* p) {
    V r;
    for (int i = 0; i < 16; i++) {
        uint32_t bits = (uint32_t)(p[2 * i] | p[2 * i + 1] << 8) << 16;
        std::memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
inline V load_u8(const uint8_t* p) { return each([&](int i) { return (float)p[i]; }); }
struct Fp8Table {
    float value[256];
    Fp8Table() {
        for (int i = 0; i < 256; i++) {
            int e = i >> 3 & 15, m = i & 7;
            float v = (i & 127) == 127 ? NAN : e ? std::ldexp(1 + m / 8.0f, e - 7) : std::ldexp((float)m, -9);
            value[i] = i & 128 ? -v : v;
        }
    }
};
const Fp8Table kFp8;
inline void load_fp8_64(const uint8_t* p, V* w) {
    for (int i = 0; i < 64; i++) w[i / 16].v[i % 16] = kFp8.value[p[i]];
}

#endif

// 64 weights of a format other than nibbles, in float32. scale, zero: one per 32 inputs.
template <int F>
inline void decode64(const uint8_t* p, const float* scale, const float* zero, V* w) {
    if (F == LM_FP8) load_fp8_64(p, w);
    for (int i = 0; i < 4; i++) {
        if (F == LM_F32) w[i] = vload((const float*)p + 16 * i);
        if (F == LM_BF16) w[i] = load_bf16(p + 32 * i);
        if (F == LM_INT8) w[i] = vsub(load_u8(p + 16 * i), vset(zero[i / 2]));
        if (F == LM_FP8 || F == LM_INT8) w[i] = vmul(w[i], vset(scale[i / 2]));
    }
}

#if defined(LM_AVX512)

inline __m512i round_bf16(V low, V high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// True where multiplying an e4m3 value is adding to its exponent, without overflow or underflow.
inline bool is_modest_power_of_two(float scale) {
    uint32_t bits;
    std::memcpy(&bits, &scale, sizeof(bits));
    return !(bits & 0x807fffffu) && bits >> 23 > 27 && bits >> 23 < 227;
}

// Multiplies bf16 numbers by such a scale; zeros and NaN stay what they are.
inline void add_exponent(float scale, __m512i* w) {
    uint32_t bits;
    std::memcpy(&bits, &scale, sizeof(bits));
    const __m512i by = _mm512_set1_epi16((short)((bits >> 16) - 0x3f80));
    for (int i = 0; i < 2; i++) {
        __m512i below = _mm512_sub_epi16(_mm512_and_si512(w[i], _mm512_set1_epi16(0x7fff)), _mm512_set1_epi16(1));
        __mmask32 numbers = _mm512_cmplt_epu16_mask(below, _mm512_set1_epi16(0x7f7f));
        w[i] = _mm512_mask_add_epi16(w[i], numbers, w[i], by);
    }
}

// 64 weights rounded to bf16 (exact for FP8 with power-of-two scales), as two vectors of 32.
template <int F>
inline void decode64_bf16(const uint8_t* p, const float* scale, const float* zero, __m512i* w) {
    if (F == LM_BF16) {
        w[0] = _mm512_loadu_si512(p);
        w[1] = _mm512_loadu_si512(p + 64);
        return;
    }
    if (F == LM_FP8 && is_modest_power_of_two(scale[0])) {
        fp8_words(p, w);
        return add_exponent(scale[0], w);
    }
    V f[4];
    if (F == LM_INT8) {
        // Not (u - zero) * scale as elsewhere: one instruction less, and the difference is lost in the rounding.
        for (int g = 0; g < 2; g++) {
            const V factor = vset(scale[g]), shift = vset(-zero[g] * scale[g]);
            for (int i = 2 * g; i < 2 * g + 2; i++) f[i] = vfma(load_u8(p + 16 * i), factor, shift);
        }
    } else {
        decode64<F>(p, scale, zero, f);
    }
    w[0] = round_bf16(f[0], f[1]);
    w[1] = round_bf16(f[2], f[3]);
}

// 128 nibbles in bf16 before scaling, as four vectors of 32: a table of 32 words holds the values twice, because a
// permutation looks at five bits.
template <int F>
inline void nibbles128_bf16(const uint8_t* p, __m512i* w) {
    const __m512i table = round_bf16(nibble_values<F>(), nibble_values<F>());
    __m512i words = _mm512_loadu_si512(p);
    for (int j = 0; j < 4; j++) w[j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * nibble_of<F>(j)), table);
}

// The sixteen values of each of two groups, scaled and rounded to bf16. has_zero: whether zero points are looked at.
template <int F, bool has_zero>
inline __m512i two_tables(const float* scale, const float* zero) {
    V values[2];
    for (int g = 0; g < 2; g++) {
        values[g] = nibble_values<F>();
        if (F == LM_INT4 && has_zero) values[g] = vsub(values[g], vset(zero[g] - 8));
        values[g] = vmul(values[g], vset(scale[g]));
    }
    return round_bf16(values[0], values[1]);
}

// 128 nibbles, scaled and rounded to bf16 (exact for FP4): a table of 64 words holds the values of all four groups, and
// bits 4 and 5 of an index say which group.
template <int F>
inline void decode128_bf16(const uint8_t* p, const float* scale, const float* zero, __m512i* w) {
    const __m512i group = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_set_epi64x(
                              0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0)), 4);
    const __m512i nibble = _mm512_set1_epi16(15);
    const __m512i low = two_tables<F, true>(scale, zero), high = two_tables<F, true>(scale + 2, zero + 2);
    __m512i words = _mm512_loadu_si512(p);
    for (int j = 0; j < 4; j++) {
        __m512i word = _mm512_srli_epi16(words, 4 * nibble_of<F>(j));
        __m512i index = _mm512_ternarylogic_epi64(word, nibble, group, 0xea);  // a & b | c
        w[j] = _mm512_permutex2var_epi16(low, index, high);
    }
}

// One block in bf16, scaled: block_size(F) / 32 vectors.
template <int F>
inline void decode_block_bf16(const uint8_t* p, const float* scale, const float* zero, __m512i* w) {
    if constexpr (is_nibbles(F)) decode128_bf16<F>(p, scale, zero, w);
    else if constexpr (is_book(F)) scaled_levels128_bf16<F>(p, scale, zero, w);
    else decode64_bf16<F>(p, scale, zero, w);
}

#endif

}  // namespace
}  // namespace lm
