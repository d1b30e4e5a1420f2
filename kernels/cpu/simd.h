// V: sixteen float32 lanes, in AVX-512, AVX2 or plain C++, with the same lanes and the same order of additions in each.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(LM_AVX512) || defined(LM_AVX2)
#include <immintrin.h>
#endif

namespace lm {
namespace {

#if defined(LM_AVX512)

using V = __m512;
inline V vzero() { return _mm512_setzero_ps(); }
inline V vset(float x) { return _mm512_set1_ps(x); }
inline V vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, V a) { _mm512_storeu_ps(p, a); }
inline V vadd(V a, V b) { return _mm512_add_ps(a, b); }
inline V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
// b where either is NaN, here and below.
inline V vmin(V a, V b) { return _mm512_min_ps(a, b); }
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V vround(V a) { return _mm512_roundscale_ps(a, 0); }
inline V vabs(V a) { return _mm512_abs_ps(a); }
// c where a < b, else d.
inline V vless(V a, V b, V c, V d) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), d, c); }
inline V vpow2(V n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }

// table[index[lane]] for indices below 16.
inline V vlookup(V table, const uint8_t* index) {
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)index)), table);
}

// Four group scales, each for four lanes.
inline V spread4(const float* four) {
    const __m512i index = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(four)));
}

inline __m256 half(V a, int which) {
    return which ? _mm512_extractf32x8_ps(a, 1) : _mm512_castps512_ps256(a);
}

// Lanes that are integers from 0 to 255, as bytes.
inline void vbytes(uint8_t* p, V a) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a)));
}

#elif defined(LM_AVX2)

struct V {
    __m256 a, b;
};
inline V vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V vset(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void vstore(float* p, V x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline V vadd(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V vsub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V vmul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V vdiv(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V vmin(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline V vmax(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V vfma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V vround(V x) { return {_mm256_round_ps(x.a, 0), _mm256_round_ps(x.b, 0)}; }
inline V vabs(V x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline V vless(V x, V y, V z, V w) {
    return {_mm256_blendv_ps(w.a, z.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(w.b, z.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline __m256 pow2_8(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline V vpow2(V n) { return {pow2_8(n.a), pow2_8(n.b)}; }
inline __m256 lookup_8(V table, const uint8_t* index) {
    const __m256i lane = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)index));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.a, lane), _mm256_permutevar8x32_ps(table.b, lane),
                            _mm256_castsi256_ps(_mm256_slli_epi32(lane, 28)));
}
inline V vlookup(V table, const uint8_t* index) { return {lookup_8(table, index), lookup_8(table, index + 8)}; }
inline V spread4(const float* four) {
    __m256 s = _mm256_broadcast_ps((const __m128*)four);
    const __m256i low = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0), high = _mm256_set_epi32(3, 3, 3, 3, 2, 2, 2, 2);
    return {_mm256_permutevar8x32_ps(s, low), _mm256_permutevar8x32_ps(s, high)};
}

inline __m256 half(V x, int which) { return which ? x.b : x.a; }
inline void vbytes(uint8_t* p, V x) {
    const __m256i pairs = _mm256_packs_epi32(_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b));
    const __m256i in_order = _mm256_permute4x64_epi64(pairs, 0xd8);
    const __m128i low = _mm256_castsi256_si128(in_order), high = _mm256_extracti128_si256(in_order, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(low, high));
}

#else

struct V {
    float v[16];
};
template <class F>
inline V each(F f) {
    V r;
    for (int i = 0; i < 16; i++) r.v[i] = f(i);
    return r;
}
inline V vzero() { return each([](int) { return 0.0f; }); }
inline V vset(float x) { return each([=](int) { return x; }); }
inline V vload(const float* p) { return each([=](int i) { return p[i]; }); }
inline void vstore(float* p, const V& a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline V vadd(const V& a, const V& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline V vsub(const V& a, const V& b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline V vmul(const V& a, const V& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline V vdiv(const V& a, const V& b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline V vmin(const V& a, const V& b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline V vmax(const V& a, const V& b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline V vfma(const V& a, const V& b, const V& c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline V vabs(const V& a) { return each([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; }); }
inline V vless(const V& a, const V& b, const V& c, const V& d) {
    return each([&](int i) { return a.v[i] < b.v[i] ? c.v[i] : d.v[i]; });
}
inline V vround(const V& a) { return each([&](int i) { return std::nearbyintf(a.v[i]); }); }
inline V vpow2(const V& n) { return each([&](int i) { return std::ldexp(1.0f, (int)n.v[i]); }); }
inline V vlookup(const V& table, const uint8_t* index) { return each([&](int i) { return table.v[index[i]]; }); }
inline V spread4(const float* four) { return each([=](int i) { return four[i / 4]; }); }

inline float vsum(const V& a) {
    float s[16];
    std::memcpy(s, a.v, sizeof(s));
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}
inline float vleast(const V& a) {
    float least = a.v[0];
    for (float lane : a.v) least = lane < least ? lane : least;
    return least;
}
inline int first_of_least_sum(const V* x) {
    float least = vsum(x[0]);
    int first = 0;
    for (int i = 1; i < 8; i++) {
        const float sum = vsum(x[i]);
        if (sum < least) least = sum, first = i;
    }
    return first;
}
inline void vbytes(uint8_t* p, const V& a) {
    for (int i = 0; i < 16; i++) p[i] = (uint8_t)a.v[i];
}
inline void lookup32(const uint8_t* table, const uint8_t* pairs, uint8_t* out) {
    for (int i = 0; i < 16; i++) out[2 * i] = table[pairs[i] & 15], out[2 * i + 1] = table[pairs[i] >> 4];
}

#endif

#if defined(LM_AVX512) || defined(LM_AVX2)
inline float least8(__m256 a) {
    __m128 q = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    q = _mm_min_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_min_ss(q, _mm_movehdup_ps(q)));
}
inline float vleast(V a) { return least8(_mm256_min_ps(half(a, 0), half(a, 1))); }

// What a table of sixteen says of 32 codes of four bits, of which the lower of a byte is the first.
inline void lookup32(const uint8_t* table, const uint8_t* pairs, uint8_t* out) {
    const __m128i both = _mm_loadu_si128((const __m128i*)pairs), nibble = _mm_set1_epi8(15);
    const __m128i first = _mm_and_si128(both, nibble), second = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
    const __m128i of = _mm_loadu_si128((const __m128i*)table);
    _mm_storeu_si128((__m128i*)out, _mm_shuffle_epi8(of, _mm_unpacklo_epi8(first, second)));
    _mm_storeu_si128((__m128i*)(out + 16), _mm_shuffle_epi8(of, _mm_unpackhi_epi8(first, second)));
}

inline __m256 halves_sum(V a) { return _mm256_add_ps(half(a, 0), half(a, 1)); }

// Lane i + lane i + 4, then + 2, + 1.
inline float sum8(__m256 a) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

// Lane i + lane i + 8, then as sum8.
inline float vsum(V a) { return sum8(halves_sum(a)); }

// The first of eight vectors with the least vsum; no branch, which could not be foretold.
inline int first_of_least_sum(const V* x) {
    __m256 two[4];  // of each of two vectors lane i + lane i + 4
    for (int i = 0; i < 4; i++) {
        const __m256 a = halves_sum(x[2 * i]), b = halves_sum(x[2 * i + 1]);
        two[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    __m256 four[2];
    for (int i = 0; i < 2; i++) {
        const __m256 a = two[2 * i], b = two[2 * i + 1];
        four[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    }
    __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(four[0], four[1], 0x88), _mm256_shuffle_ps(four[0], four[1], 0xdd));
    sums = _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const int found = _mm256_movemask_ps(_mm256_cmp_ps(sums, _mm256_set1_ps(least8(sums)), _CMP_EQ_OQ));
    return found ? __builtin_ctz(found) : 0;
}
#endif

// e ** r * 2 ** n for |r| <= log(2) / 2 (Cephes, expf).
inline V vexp_parts(V r, V n) {
    V p = vset(1.9875691500e-4f);
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    p = vfma(p, vmul(r, r), vadd(r, vset(1.0f)));
    return vmul(p, vpow2(n));
}

// exp of each lane for |x| <= 87, within 2 ulp.
inline V vexp(V x) {
    V n = vround(vmul(x, vset(1.44269504088896341f)));
    V r = vfma(n, vset(-0.693359375f), x);
    r = vfma(n, vset(2.12194440e-4f), r);
    return vexp_parts(r, n);
}

// 2 to the power of each lane for |x| <= 125, likewise.
inline V vexp2(V x) {
    const V n = vround(x);
    return vexp_parts(vmul(vsub(x, n), vset(0.69314718055994531f)), n);
}

// silu(min(g, limit)) * clamp(u, -limit, limit). The operand order of vmin and vmax lets NaN through. Below -87 silu is
// less than 1e-35 and stays what it is there.
inline V vswiglu(V g, V u, float limit) {
    g = vmin(vset(limit), vmax(vset(-87.0f), g));
    u = vmin(vset(limit), vmax(vset(-limit), u));
    return vmul(vdiv(g, vadd(vset(1.0f), vexp(vsub(vzero(), vmin(vset(87.0f), g))))), u);
}

}  // namespace
}  // namespace lm
