// Scales and zero points of one row as they are stored, expanded to one float32 per 32 inputs.
#pragma once
#include "decode.h"

namespace lm {
namespace {

// Zero points, which are expanded as scales are: numbers of a byte.
constexpr int kZeroPoints = LM_SCALE_NONE;

inline float scale_value(const void* scale, int type, int64_t i) {
    if (type == kZeroPoints) return ((const uint8_t*)scale)[i];
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

// Sixteen neighbouring scales.
template <int Type>
inline V scale_values16(const void* scale, int64_t i) {
    if (Type == LM_SCALE_F32) return vload((const float*)scale + i);
    if (Type == kZeroPoints) return load_u8((const uint8_t*)scale + i);
    if (Type == LM_SCALE_BF16) return load_bf16((const uint8_t*)scale + 2 * i);
#if defined(LM_AVX512)
    if (Type == LM_SCALE_F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)scale + i)));
    if (Type == LM_SCALE_E8M0) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)((const uint8_t*)scale + i)));
        // Byte 255 gives infinity here; the formats refuse it before.
        return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x00400000)));
    }
#elif defined(LM_AVX2)
    if (Type == LM_SCALE_F16) {
        const __m128i* halves = (const __m128i*)((const uint16_t*)scale + i);
        return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    }
    if (Type == LM_SCALE_E8M0) {
        // As above.
        const __m256i least = _mm256_set1_epi32(0x00400000);
        const __m256i low = _mm256_slli_epi32(bytes8((const uint8_t*)scale + i), 23);
        const __m256i high = _mm256_slli_epi32(bytes8((const uint8_t*)scale + i + 8), 23);
        return {_mm256_castsi256_ps(_mm256_max_epu32(low, least)), _mm256_castsi256_ps(_mm256_max_epu32(high, least))};
    }
#endif
    float values[16];
    for (int j = 0; j < 16; j++) values[j] = scale_value(scale, Type, i + j);
    return vload(values);
}

// Scales [first, first + count), each written `repeat` times but not beyond out[limit].
template <int Type>
inline void expand(const void* scale, int64_t first, int64_t count, int64_t repeat, float* out, int64_t limit) {
    const auto write16 = [&](int64_t g) {
        float values[16], *to = out + g * repeat;
        vstore(values, scale_values16<Type>(scale, first + g));
        if (repeat == 1) std::memcpy(to, values, sizeof(values));
        else if (repeat == 2) for (int64_t i = 0; i < 16; i++) to[2 * i] = to[2 * i + 1] = values[i];
        else if (repeat == 4) for (int64_t i = 0; i < 16; i += 4) vstore(to + 4 * i, spread4(values + i));
        else for (int64_t i = 0; i < 16 * repeat; i++) to[i] = values[i / repeat];
    };
    int64_t g = 0;
    for (; g + 16 <= count && (g + 16) * repeat <= limit; g += 16) write16(g);
    // The last sixteen, some of them once more, rather than the rest one by one.
    if (g && g < count && count * repeat <= limit) write16(count - 16), g = count;
    for (; g < count; g++) {
        const float value = scale_value(scale, Type, first + g);
        for (int64_t u = g * repeat; u < (g + 1) * repeat && u < limit; u++) out[u] = value;
    }
}

// Writes the scales of one row of a codebook format, and the numbers of its tables.
inline void expand_marks(const lm_matrix& m, int64_t row, float* scale, float* number) {
    const int64_t count = m.cols / kScaleUnit;
    const uint8_t* marks = (const uint8_t*)m.scale + row * (count + 4);
    for (int64_t at = 0; at < count; at += 64) prefetch(marks + 8 * (count + 4) + at);
    float whole, steps[8];
    std::memcpy(&whole, marks, sizeof(whole));
    marks += sizeof(whole);
    for (int i = 0; i < 8; i++) steps[i] = whole * kSteps[i];
    int64_t g = 0;
#if defined(LM_AVX512)
    const __m512 table = _mm512_castps256_ps512(_mm256_loadu_ps(steps));
    for (; g + 16 <= count; g += 16) {
        const __m512i mark = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(marks + g)));
        vstore(scale + g, _mm512_permutexvar_ps(_mm512_srli_epi32(mark, 5), table));
        _mm512_storeu_si512(number + g, _mm512_and_si512(mark, _mm512_set1_epi32(31)));
    }
#elif defined(LM_AVX2)
    const __m256 table = _mm256_loadu_ps(steps);
    for (; g + 8 <= count; g += 8) {
        const __m256i mark = bytes8(marks + g);
        _mm256_storeu_ps(scale + g, _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(mark, 5)));
        _mm256_storeu_si256((__m256i*)(number + g), _mm256_and_si256(mark, _mm256_set1_epi32(31)));
    }
#endif
    for (; g < count; g++) {
        const int32_t table_number = marks[g] & 31;
        scale[g] = steps[marks[g] >> 5];
        std::memcpy(number + g, &table_number, sizeof(table_number));
    }
}

// Writes one row's scales, and zero points if it has any, per 32 inputs. Rows a little further on are fetched: their
// scales are a second stream, too slow for the processor to notice.
inline void expand_scales(const lm_matrix& m, int64_t row, float* scale, float* zero) {
    if (is_book(m.format)) return expand_marks(m, row, scale, zero);
    const int64_t group = m.format == LM_FP8 ? 128 : m.group;
    const int64_t count = (m.cols + group - 1) / group, units = (m.cols + kScaleUnit - 1) / kScaleUnit;
    const int64_t first = (m.format == LM_FP8 ? row / 128 : row) * count, repeat = group / kScaleUnit;
    const int64_t bytes = count * (m.scale_type == LM_SCALE_E8M0 ? 1 : m.scale_type == LM_SCALE_F32 ? 4 : 2);
    const uint8_t* later = (const uint8_t*)m.scale + first / count * bytes + 8 * bytes;
    for (int64_t at = 0; at < bytes; at += 64) prefetch(later + at);
    if (m.scale_type == LM_SCALE_F32) expand<LM_SCALE_F32>(m.scale, first, count, repeat, scale, units);
    if (m.scale_type == LM_SCALE_BF16) expand<LM_SCALE_BF16>(m.scale, first, count, repeat, scale, units);
    if (m.scale_type == LM_SCALE_F16) expand<LM_SCALE_F16>(m.scale, first, count, repeat, scale, units);
    if (m.scale_type == LM_SCALE_E8M0) expand<LM_SCALE_E8M0>(m.scale, first, count, repeat, scale, units);
    if (m.zero) expand<kZeroPoints>(m.zero, first, count, repeat, zero, units);
}

}  // namespace
}  // namespace lm
