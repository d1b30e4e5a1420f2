// Matrices to integers and codebooks, with a searched scale for each group.
#include <cmath>
#include <cstring>

#include "work.h"

namespace lm {
namespace {

constexpr int64_t kMaxGroup = 256;
// Rows of a piece: a tenth of a millisecond of work.
constexpr int64_t kRows = 4;

struct Round {
    const float *w, *importance;
    const int64_t rows, cols;
    const int bits;
    const int64_t group;
    const float* shares;
    const int count;
    uint8_t* codes;
    uint16_t* scales;
    Phase& phase;

    void run(int thread) {
        phase.run(thread, [&](int64_t piece) {
            for (int64_t r = piece * kRows; r < std::min((piece + 1) * kRows, rows); r++) one(r);
        });
    }

    void one(int64_t r) {
        float rounded[kMaxGroup];
        const int middle = 1 << (bits - 1);
        for (int64_t c = 0; c < cols; c += group) {
            scales[(r * cols + c) / group] = isa().round_group(w + r * cols + c, importance + c, group, (float)middle,
                                                               shares, count, rounded);
            uint8_t* out = codes + (r * cols + c) * bits / 8;
            if (bits == 8)
                for (int64_t i = 0; i < group; i++) out[i] = (uint8_t)((int)rounded[i] + middle);
            else
                for (int64_t i = 0; i < group / 2; i++)
                    out[i] = (uint8_t)(((int)rounded[2 * i] + middle) | (((int)rounded[2 * i + 1] + middle) << 4));
        }
    }
};

// Adds the sign of a code to the bits if it is a zero, without a branch.
inline void add_sign(uint8_t code, uint8_t* bits, int64_t& count) {
    const int zero = (code & 7) == 0;
    bits[count >> 3] |= (uint8_t)((zero & code >> 3) << (7 - (count & 7)));
    count += zero;
}

struct RoundBooks {
    const float *w, *importance;
    const int64_t rows, cols;
    const int bits;
    uint8_t *codes, *marks;
    Phase& phase;

    void run(int thread) {
        phase.run(thread, [&](int64_t r) { one(r); });
    }

    void one(int64_t r) {
        const float* from = w + r * cols;
        float largest = 0;
        for (int64_t c = 0; c < cols; c++) largest = std::max(largest, std::fabs(from[c]));
        if (!(largest > 0)) largest = 1;
        uint8_t* mark = marks + r * (cols / 32 + 4);
        std::memcpy(mark, &largest, 4);
        for (int64_t c = 0; c < cols; c += 32) {
            uint8_t levels[32];
            mark[4 + c / 32] = isa().round_book(bits == 3 ? LM_BOOK3 : LM_BOOK2, from + c, importance + c, largest, levels);
            for (int64_t i = 0; i < 32; i += 8) {
                uint32_t word = 0;
                for (int j = 0; j < 8; j++) word |= (uint32_t)levels[i + j] << (bits * j);
                std::memcpy(codes + (r * cols + c + i) * bits / 8, &word, bits);
            }
        }
    }
};

}  // namespace

int32_t round(const float* w, const float* importance, int64_t rows, int64_t cols, int bits, int64_t group,
              const float* shares, int count, uint8_t* codes, uint16_t* scales) {
    static Phase phase;
    if (group > kMaxGroup) return LM_BAD_ARGUMENT;
    const int threads = width_for(rows * cols * (int64_t)sizeof(float), 8 * count);
    phase.reset((rows + kRows - 1) / kRows, threads);
    Round work{w, importance, rows, cols, bits, group, shares, count, codes, scales, phase};
    run_on(threads, work);
    return LM_OK;
}

int32_t round_levels(const float* w, const float* importance, int64_t rows, int64_t cols, int64_t group,
                     const float* levels, int num_levels, const float* candidates, int count, uint8_t* chosen,
                     uint8_t* nearest) {
    static Phase phase;
    const int threads = width_for(rows * cols * (int64_t)sizeof(float), 8 * count);
    const int64_t per_row = cols / group;
    const auto one = [&](int64_t r) {
        for (int64_t g = 0; g < per_row; g++) {
            const int64_t at = r * cols + g * group, i = r * per_row + g;
            chosen[i] = (uint8_t)isa().round_levels(w + at, importance + g * group, group, levels, num_levels,
                                                    candidates + i, rows * per_row, count, nearest + at);
        }
    };
    struct Work {
        const decltype(one)& row;
        void run(int thread) { phase.run(thread, row); }
    } work{one};
    phase.reset(rows, threads);
    run_on(threads, work);
    return LM_OK;
}

int32_t round_books(const float* w, const float* importance, int64_t rows, int64_t cols, int bits, uint8_t* codes,
                    uint8_t* marks) {
    static Phase phase;
    const int threads = width_for(rows * cols * (int64_t)sizeof(float), 800);
    phase.reset(rows, threads);
    RoundBooks work{w, importance, rows, cols, bits, codes, marks, phase};
    run_on(threads, work);
    return LM_OK;
}

int64_t zero_signs(const uint8_t* codes, int64_t nbytes, uint8_t* bits) {
    int64_t count = 0;
    std::memset(bits, 0, nbytes / 4 + 1);
    for (int64_t i = 0; i < nbytes; i++) {
        add_sign(codes[i] & 15, bits, count);
        add_sign(codes[i] >> 4, bits, count);
    }
    return count;
}

}  // namespace lm
