// Packed weights to numbers, 64 inputs of one row at a time.
//
// Order of lanes: nibble formats come apart into even and odd inputs (within 32 inputs for float32, within 64 for
// bf16), because that costs nothing; pack.h puts activations in the same order. All other formats keep their order.
#pragma once
#include "localmoe_cpu.h"
#include "simd.h"

namespace lm {
namespace {

constexpr int64_t kUnit = 64;       // inputs per step
constexpr int64_t kScaleUnit = 32;  // inputs per entry of a row's expanded scales

constexpr bool is_nibbles(int format) { return format == LM_FP4 || format == LM_INT4; }

// Bytes of 64 inputs.
constexpr int64_t unit_bytes(int format) {
    return format == LM_F32 ? 256 : format == LM_BF16 ? 128 : is_nibbles(format) ? 32 : 64;
}

alignas(64) constexpr float kE2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
alignas(64) constexpr float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The sixteen values a nibble can stand for, scaled.
template <int F>
inline V nibble_table(float scale, float zero) {
    if (F == LM_FP4) return vmul(vload(kE2m1), vset(scale));
    return vmul(vsub(vload(kIota), vset(zero)), vset(scale));
}

#if defined(LM_AVX512)

inline void lookup32(const uint8_t* p, V table, V* w) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    w[0] = _mm512_permutexvar_ps(bytes, table);
    w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
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
inline __m256i bytes8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline void lookup32(const uint8_t* p, V table, V* w) {
    __m256i a = bytes8(p), b = bytes8(p + 8);
    w[0] = {lookup8(a, table), lookup8(b, table)};
    w[1] = {lookup8(_mm256_srli_epi32(a, 4), table), lookup8(_mm256_srli_epi32(b, 4), table)};
}
inline __m256 bf16_8(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline V load_bf16(const uint8_t* p) { return {bf16_8(p), bf16_8(p + 16)}; }
inline V load_u8(const uint8_t* p) { return {_mm256_cvtepi32_ps(bytes8(p)), _mm256_cvtepi32_ps(bytes8(p + 8))}; }
// Exponent and mantissa moved into place are the value times 2 ** -120; that also holds for denormals.
inline __m256 fp8_8(const uint8_t* p) {
    __m256i x = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)), seven = _mm256_set1_epi32(127);
    __m256i bits = _mm256_and_si256(_mm256_slli_epi32(x, 20), _mm256_set1_epi32((int)0x87f00000));
    __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p120f));
    __m256i nan = _mm256_cmpeq_epi32(_mm256_and_si256(x, seven), seven);
    return _mm256_or_ps(value, _mm256_castsi256_ps(nan));
}
inline void load_fp8_64(const uint8_t* p, V* w) {
    for (int i = 0; i < 4; i++) w[i] = {fp8_8(p + 16 * i), fp8_8(p + 16 * i + 8)};
}

#else

inline void lookup32(const uint8_t* p, const V& table, V* w) {
    for (int i = 0; i < 16; i++) {
        w[0].v[i] = table.v[p[i] & 15];
        w[1].v[i] = table.v[p[i] >> 4];
    }
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

// 64 weights in float32. scale, zero: one per 32 inputs.
template <int F>
inline void decode64(const uint8_t* p, const float* scale, const float* zero, V* w) {
    if (is_nibbles(F)) {
        lookup32(p, nibble_table<F>(scale[0], zero[0]), w);
        lookup32(p + 16, nibble_table<F>(scale[1], zero[1]), w + 2);
        return;
    }
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

// 64 weights rounded to bf16 (exact for FP4 and, with power-of-two scales, FP8), as two vectors of 32.
template <int F>
inline void decode64_bf16(const uint8_t* p, const float* scale, const float* zero, __m512i* w) {
    if (is_nibbles(F)) {
        // A table of 32 words holds both groups' values; bit 4 of an index says which group.
        const __m512i second = _mm512_set_epi64(0x10001000100010, 0x10001000100010, 0x10001000100010,
                                                0x10001000100010, 0, 0, 0, 0);
        __m512i table = round_bf16(nibble_table<F>(scale[0], zero[0]), nibble_table<F>(scale[1], zero[1]));
        __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
        __m512i low = _mm512_ternarylogic_epi64(bytes, _mm512_set1_epi16(15), second, 0xea);  // bytes & 15 | second
        __m512i high = _mm512_or_si512(_mm512_srli_epi16(bytes, 4), second);
        w[0] = _mm512_permutexvar_epi16(low, table);
        w[1] = _mm512_permutexvar_epi16(high, table);
        return;
    }
    if (F == LM_BF16) {
        w[0] = _mm512_loadu_si512(p);
        w[1] = _mm512_loadu_si512(p + 64);
        return;
    }
    V f[4];
    decode64<F>(p, scale, zero, f);
    w[0] = round_bf16(f[0], f[1]);
    w[1] = round_bf16(f[2], f[3]);
}

#endif

// --- scales of one row, expanded to one float32 per 32 inputs ---

inline float scale_value(const void* scale, int type, int64_t i) {
    uint32_t bits = 0;
    float value;
    if (type == LM_SCALE_F32) return ((const float*)scale)[i];
    if (type == LM_SCALE_BF16) bits = (uint32_t)((const uint16_t*)scale)[i] << 16;
    if (type == LM_SCALE_E8M0) {
        bits = ((const uint8_t*)scale)[i];
        bits = bits == 255 ? 0x7fc00000u : bits ? bits << 23 : 0x00400000u;  // byte 0 is 2 ** -127, a denormal
    }
    if (type == LM_SCALE_F16) {
        uint32_t h = ((const uint16_t*)scale)[i], sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
        if (rest >= 0x7c00u) bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
        else {
            bits = sign | rest << 13;
            std::memcpy(&value, &bits, 4);
            return value * 0x1p112f;
        }
    }
    std::memcpy(&value, &bits, 4);
    return value;
}

#if defined(LM_AVX512)
// Sixteen scales of a row whose groups are 32 inputs, the common case.
inline V scale_values16(const void* scale, int type, int64_t i) {
    if (type == LM_SCALE_F32) return vload((const float*)scale + i);
    if (type == LM_SCALE_BF16) return load_bf16((const uint8_t*)scale + 2 * i);
    if (type == LM_SCALE_F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)scale + i)));
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)((const uint8_t*)scale + i)));
    __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x00400000));
    return _mm512_castsi512_ps(bits);  // byte 255 gives infinity; the formats refuse it before
}
#endif

inline void expand_scales(const lm_matrix& m, int64_t row, float* scale, float* zero) {
    const int64_t group = m.format == LM_FP8 ? 128 : m.group;
    const int64_t per_row = (m.cols + group - 1) / group, units = (m.cols + kScaleUnit - 1) / kScaleUnit;
    const int64_t first = (m.format == LM_FP8 ? row / 128 : row) * per_row, repeat = group / kScaleUnit;
    int64_t g = 0;
#if defined(LM_AVX512)
    if (repeat == 1)
        for (; g + 16 <= per_row; g += 16) vstore(scale + g, scale_values16(m.scale, m.scale_type, first + g));
#endif
    for (; g < per_row; g++) {
        float value = scale_value(m.scale, m.scale_type, first + g);
        for (int64_t u = g * repeat; u < (g + 1) * repeat && u < units; u++) scale[u] = value;
    }
    if (m.zero)
        for (g = 0; g < per_row; g++)
            for (int64_t u = g * repeat; u < (g + 1) * repeat && u < units; u++)
                zero[u] = ((const uint8_t*)m.zero)[first + g];
}

}  // namespace
}  // namespace lm
