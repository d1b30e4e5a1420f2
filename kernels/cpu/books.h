// Codebook formats: 3 or 2 bits choose one of the levels of a group's table. Levels are whole numbers up to 127, which
// bf16 holds exactly; scales come later.
//
// Codes of neighbouring inputs follow each other from the lowest bit on, and come apart in the order that decode.h
// describes: vector j holds inputs 8 i + j (bf16: 4 i + j) in lane i.
#pragma once
#include "codebooks.h"
#include "isa.h"
#include "simd.h"

namespace lm {
namespace {

constexpr int book_bits(int format) { return format == LM_BOOK3 ? 3 : 2; }
constexpr int num_levels(int format) { return 1 << book_bits(format); }

inline const int8_t* table_at(int format, int number) {
    return format == LM_BOOK3 ? kTables3[number] : kTables2[number];
}

// The same level of all tables, side by side.
struct LevelsOfTables {
    float three[8][32] = {}, two[4][32] = {};
    constexpr LevelsOfTables() {
        for (int t = 0; t < 32; t++) {
            for (int l = 0; l < 8; l++) three[l][t] = kTables3[t][l];
            for (int l = 0; l < 4; l++) two[l][t] = kTables2[t][l];
        }
    }
};
alignas(64) constexpr LevelsOfTables kLevelsOfTables;
inline const float* level_of_tables(int format, int level) {
    return format == LM_BOOK3 ? kLevelsOfTables.three[level] : kLevelsOfTables.two[level];
}

// Numbers of tables are kept where other formats keep zero points, as integers.
inline int number_at(const float* numbers, int group) {
    int32_t number;
    std::memcpy(&number, numbers + group, sizeof(number));
    return number;
}

#if defined(LM_AVX512)

// The levels of the tables of four neighbouring groups, one after the other, in two vectors; of BOOK2 the first is full.
template <int F>
inline void four_tables(const float* numbers, V* levels) {
    __m128i low, high = _mm_setzero_si128();
    if (F == LM_BOOK3) {
        int64_t t[4];
        for (int g = 0; g < 4; g++) std::memcpy(&t[g], table_at(F, number_at(numbers, g)), 8);
        low = _mm_set_epi64x(t[1], t[0]);
        high = _mm_set_epi64x(t[3], t[2]);
    } else {
        int32_t t[4];
        for (int g = 0; g < 4; g++) std::memcpy(&t[g], table_at(F, number_at(numbers, g)), 4);
        low = _mm_set_epi32(t[3], t[2], t[1], t[0]);
    }
    levels[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low));
    levels[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high));
}

// Bytes of BOOK3 to words: eight codes in 32 bits, or four in 16, of which every other begins in the middle of a byte.
struct BookOrder {
    uint8_t wide[64] = {}, narrow[64] = {};
    constexpr BookOrder() {
        for (int i = 0; i < 64; i++) {
            wide[i] = i % 4 < 3 ? i / 4 * 3 + i % 4 : 63;
            narrow[i] = i / 2 * 3 / 2 + i % 2;
        }
    }
};
alignas(64) constexpr BookOrder kBookOrder;
inline __m512i ordered48(const uint8_t* p, const uint8_t* order) {
    return _mm512_permutexvar_epi8(_mm512_loadu_si512(order), _mm512_maskz_loadu_epi8(0xffffffffffffull, p));
}

// 128 levels; numbers: of each group's table.
template <int F>
inline void levels128(const uint8_t* p, const float* numbers, V* w) {
    constexpr int bits = book_bits(F);
    const __m512i group = _mm512_slli_epi32(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), bits);
    const __m512i mask = _mm512_set1_epi32(num_levels(F) - 1);
    const __m512i words = F == LM_BOOK3 ? ordered48(p, kBookOrder.wide)
                                        : _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    V levels[2];
    four_tables<F>(numbers, levels);
    for (int j = 0; j < 8; j++) {
        __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, bits * j), mask, group, 0xea);  // a & b | c
        w[j] = F == LM_BOOK3 ? _mm512_permutex2var_ps(levels[0], index, levels[1])
                             : _mm512_permutexvar_ps(index, levels[0]);
    }
}

// 128 inputs in bf16, as four vectors of 32, given the levels of their groups.
template <int F>
inline void look_up128_bf16(const uint8_t* p, __m512i levels, __m512i* w) {
    constexpr int bits = book_bits(F);
    const __m512i group = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_set_epi64x(
                              0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0)), bits);
    const __m512i mask = _mm512_set1_epi16(num_levels(F) - 1);
    const __m512i words = F == LM_BOOK3
        ? _mm512_srlv_epi16(ordered48(p, kBookOrder.narrow), _mm512_set1_epi32(0x00040000))
        : _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
    for (int j = 0; j < 4; j++) {
        __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, bits * j), mask, group, 0xea);
        w[j] = _mm512_permutexvar_epi16(index, levels);
    }
}

// The tables in bf16. Constant, because code that ran at load time would use instructions a machine may lack.
constexpr uint16_t whole_as_bf16(int x) {
    if (!x) return 0;
    const int magnitude = x < 0 ? -x : x;
    int top = 6;
    while (!(magnitude >> top)) top--;
    return (uint16_t)((x < 0 ? 0x8000 : 0) | (127 + top) << 7 | (magnitude << (7 - top) & 127));
}
struct WideTables {
    uint16_t three[32][8] = {}, two[32][4] = {};
    constexpr WideTables() {
        for (int t = 0; t < 32; t++) {
            for (int l = 0; l < 8; l++) three[t][l] = whole_as_bf16(kTables3[t][l]);
            for (int l = 0; l < 4; l++) two[t][l] = whole_as_bf16(kTables2[t][l]);
        }
    }
};
alignas(64) constexpr WideTables kWideTables;

template <int F>
inline void levels128_bf16(const uint8_t* p, const float* numbers, __m512i* w) {
    __m512i levels;
    if (F == LM_BOOK3) {
        auto table = [&](int g) { return _mm_load_si128((const __m128i*)kWideTables.three[number_at(numbers, g)]); };
        levels = _mm512_inserti64x2(_mm512_castsi128_si512(table(0)), table(1), 1);
        levels = _mm512_inserti64x2(_mm512_inserti64x2(levels, table(2), 2), table(3), 3);
    } else {
        int64_t t[4];
        for (int g = 0; g < 4; g++) std::memcpy(&t[g], kWideTables.two[number_at(numbers, g)], 8);
        levels = _mm512_castsi256_si512(_mm256_set_epi64x(t[3], t[2], t[1], t[0]));
    }
    look_up128_bf16<F>(p, levels, w);
}

// Scaled, and rounded once more.
template <int F>
inline void scaled_levels128_bf16(const uint8_t* p, const float* scale, const float* numbers, __m512i* w) {
    V levels[2];
    four_tables<F>(numbers, levels);
    if (F == LM_BOOK3) {
        const __m512i half = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        const V scales = _mm512_castps128_ps512(_mm_loadu_ps(scale));
        levels[0] = _mm512_mul_ps(levels[0], _mm512_permutexvar_ps(half, scales));
        levels[1] = _mm512_mul_ps(levels[1], _mm512_permutexvar_ps(_mm512_add_epi32(half, _mm512_set1_epi32(2)), scales));
    } else {
        levels[0] = _mm512_mul_ps(levels[0], spread4(scale));
    }
    look_up128_bf16<F>(p, (__m512i)_mm512_cvtne2ps_pbh(levels[1], levels[0]), w);
}

#elif defined(LM_AVX2)

inline __m256 floats8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
// Four words of BOOK3, which begin `skip` bytes after p.
inline __m128i ordered12(const uint8_t* p, int skip) {
    const __m128i order = _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0);
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), _mm_add_epi8(order, _mm_set1_epi8((char)skip)));
}

// 128 levels; numbers: of each group's table. Each half of a vector has two groups, and so two tables.
template <int F>
inline void levels128(const uint8_t* p, const float* numbers, V* w) {
    constexpr int bits = book_bits(F);
    __m256i words[2];
    if (F == LM_BOOK3) {
        words[0] = _mm256_set_m128i(ordered12(p + 12, 0), ordered12(p, 0));
        words[1] = _mm256_set_m128i(ordered12(p + 32, 4), ordered12(p + 24, 0));  // nothing beyond 48 bytes
    } else {
        for (int h = 0; h < 2; h++) words[h] = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + h));
    }
    const __m256i mask = _mm256_set1_epi32(num_levels(F) - 1);
    for (int h = 0; h < 2; h++) {
        const int8_t *a = table_at(F, number_at(numbers, 2 * h)), *b = table_at(F, number_at(numbers, 2 * h + 1));
        __m256 first, second;
        if (F == LM_BOOK3) {
            first = floats8(a);
            second = floats8(b);
        } else {
            int32_t both[2];
            std::memcpy(&both[0], a, 4);
            std::memcpy(&both[1], b, 4);
            first = floats8((const int8_t*)both);
        }
        for (int j = 0; j < 8; j++) {
            const __m256i index = _mm256_and_si256(_mm256_srli_epi32(words[h], bits * j), mask);
            const __m256 found = F == LM_BOOK3
                ? _mm256_blend_ps(_mm256_permutevar8x32_ps(first, index), _mm256_permutevar8x32_ps(second, index), 0xf0)
                : _mm256_permutevar_ps(first, index);
            (h ? w[j].b : w[j].a) = found;
        }
    }
}

#else

template <int F>
inline void levels128(const uint8_t* p, const float* numbers, V* w) {
    constexpr int bits = book_bits(F);
    for (int i = 0; i < 16; i++) {
        uint32_t word = 0;
        std::memcpy(&word, p + bits * i, bits);  // eight codes
        const int8_t* table = table_at(F, number_at(numbers, i / 4));
        for (int j = 0; j < 8; j++) w[j].v[i] = table[word >> (bits * j) & (num_levels(F) - 1)];
    }
}

#endif

}  // namespace
}  // namespace lm
