// Whole matrices as numbers: decoded, or compared with others.
#include "work.h"

namespace lm {
namespace {

// Rows of a piece: enough to be worth taking, and whole blocks of FP8, whose rows share scales.
constexpr int64_t kRows = 128;

// Calls rows(thread, first, last) for pieces of [0, count), of `bytes` each in all.
template <class Rows>
void by_rows(Phase& phase, int64_t count, int64_t bytes, Rows rows) {
    struct Work {
        Phase& phase;
        const int64_t count;
        Rows& rows;
        void run(int thread) {
            phase.run(thread, [&](int64_t piece) {
                rows(thread, piece * kRows, std::min((piece + 1) * kRows, count));
            });
        }
    } work{phase, count, rows};
    const int width = width_for(bytes, 1);
    phase.reset((count + kRows - 1) / kRows, width);
    run_on(width, work);
}

}  // namespace

int32_t decode(const lm_matrix& w, float* out, std::vector<ThreadMemory>& memory) {
    static Phase phase;
    prepare(memory, threads(), 0);
    by_rows(phase, w.rows, 4 * w.rows * w.cols, [&](int thread, int64_t first, int64_t last) {
        isa().decode(w, first, last, out + first * w.cols, memory[thread].scratch());
    });
    return LM_OK;
}

int32_t compare(const float* a, const float* b, int64_t rows, int64_t cols, double* sums) {
    static Phase phase;
    by_rows(phase, rows, 8 * rows * cols, [&](int, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) isa().compare(a + r * cols, b + r * cols, cols, sums + 4 * r);
    });
    return LM_OK;
}

}  // namespace lm
