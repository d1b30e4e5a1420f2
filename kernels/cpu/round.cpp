// Matrices to integers, with a searched scale for each group.
#include "work.h"

namespace lm {
namespace {

constexpr int64_t kMaxGroup = 256;
// Rows of a piece: a tenth of a millisecond of work.
constexpr int64_t kRows = 4;

struct Round {
    const float* w;
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
            scales[(r * cols + c) / group] = isa().round_group(w + r * cols + c, group, (float)middle, shares, count, rounded);
            uint8_t* out = codes + (r * cols + c) * bits / 8;
            if (bits == 8)
                for (int64_t i = 0; i < group; i++) out[i] = (uint8_t)((int)rounded[i] + middle);
            else
                for (int64_t i = 0; i < group / 2; i++)
                    out[i] = (uint8_t)(((int)rounded[2 * i] + middle) | (((int)rounded[2 * i + 1] + middle) << 4));
        }
    }
};

}  // namespace

int32_t round(const float* w, int64_t rows, int64_t cols, int bits, int64_t group, const float* shares, int count,
              uint8_t* codes, uint16_t* scales) {
    static Phase phase;
    if (group > kMaxGroup) return LM_BAD_ARGUMENT;
    const int threads = width_for(rows * cols * (int64_t)sizeof(float), 8 * count);
    phase.reset((rows + kRows - 1) / kRows, threads);
    Round work{w, rows, cols, bits, group, shares, count, codes, scales, phase};
    run_on(threads, work);
    return LM_OK;
}

}  // namespace lm
