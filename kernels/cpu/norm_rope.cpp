// Norm and rotation of query heads and latents.
#include <cmath>

#include "work.h"

namespace lm {
namespace {

// Rows of a piece: a few microseconds of work.
constexpr int64_t kRows = 16;

struct NormRope {
    const float *x, *weight;
    const float eps;
    const float *cos, *sin;
    const int64_t rows, heads, width, pairs;
    float* y;
    Phase& phase;

    void run(int thread) {
        phase.run(thread, [&](int64_t piece) {
            for (int64_t r = piece * kRows; r < std::min((piece + 1) * kRows, rows); r++) one(r);
        });
    }

    void one(int64_t r) {
        float* out = y + r * width;
        std::copy(x + r * width, x + (r + 1) * width, out);
        if (eps >= 0) {
            const float factor = 1.0f / std::sqrt(isa().sum_of_squares(out, width) / width + eps);
            if (weight) isa().scale_by(factor, weight, width, out);
            else for (int64_t i = 0; i < width; i++) out[i] *= factor;
        }
        const float *c = cos + r / heads * pairs, *s = sin + r / heads * pairs;
        float* tail = out + width - 2 * pairs;
        for (int64_t i = 0; i < pairs; i++) {
            const float even = tail[2 * i], odd = tail[2 * i + 1];
            tail[2 * i] = even * c[i] - odd * s[i];
            tail[2 * i + 1] = odd * c[i] + even * s[i];
        }
    }
};

}  // namespace

int32_t norm_rope(const float* x, const float* weight, float eps, const float* cos, const float* sin, int64_t tokens,
                  int64_t heads, int64_t width, int64_t pairs, float* y) {
    static Phase phase;
    const int64_t rows = tokens * heads;
    const int threads = width_for(rows * width * sizeof(float), 1);
    phase.reset((rows + kRows - 1) / kRows, threads);
    NormRope work{x, weight, eps, cos, sin, rows, heads, width, pairs, y, phase};
    run_on(threads, work);
    return LM_OK;
}

}  // namespace lm
