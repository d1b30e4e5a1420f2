// Codes of a few bits put together.
#pragma once
#include <cstdint>
#include <cstring>

namespace lm {
namespace {

template <int bits>
inline void pack_eights(const uint8_t* levels, int64_t count, uint8_t* codes) {
    constexpr uint64_t twos = 0x0001000100010001u * ((1u << 2 * bits) - 1);
    constexpr uint64_t fours = 0x0000000100000001u * ((1u << 4 * bits) - 1);
    for (int64_t i = 0; i < count; i += 8, codes += bits) {
        uint64_t word;
        std::memcpy(&word, levels + i, 8);
        word = (word | word >> (8 - bits)) & twos;
        word = (word | word >> 2 * (8 - bits)) & fours;
        word |= word >> 4 * (8 - bits);
        std::memcpy(codes, &word, bits);
    }
}

// Codes of 8, 4, 3 or 2 bits, the first in the lowest; count a multiple of 8.
inline void pack_codes(const uint8_t* levels, int64_t count, int bits, uint8_t* codes) {
    if (bits == 8) std::memcpy(codes, levels, count);
    if (bits == 4) pack_eights<4>(levels, count, codes);
    if (bits == 3) pack_eights<3>(levels, count, codes);
    if (bits == 2) pack_eights<2>(levels, count, codes);
}

}  // namespace
}  // namespace lm
