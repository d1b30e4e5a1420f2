// Hyper-connections: what surrounds every sublayer, in two calls instead of two hundred small tensor operations.
#include <cmath>

#include "work.h"

namespace lm {
namespace {

constexpr int64_t kBlock = 1024;  // elements of a stream that one piece mixes

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Divides each row (or column) by its sum + eps.
void normalize(float* c, int64_t s, int64_t across, int64_t along, float eps) {
    for (int64_t i = 0; i < s; i++) {
        float sum = eps;
        for (int64_t j = 0; j < s; j++) sum += c[i * across + j * along];
        for (int64_t j = 0; j < s; j++) c[i * across + j * along] /= sum;
    }
}

// Softmax of each row, then columns, then rows and columns in turn, ending on columns (Sinkhorn).
void sinkhorn(float* c, int64_t s, int iterations, float eps) {
    for (int64_t j = 0; j < s; j++) {
        float largest = c[j * s], sum = 0;
        for (int64_t k = 1; k < s; k++) largest = std::max(largest, c[j * s + k]);
        for (int64_t k = 0; k < s; k++) sum += c[j * s + k] = std::exp(c[j * s + k] - largest);
        for (int64_t k = 0; k < s; k++) c[j * s + k] = c[j * s + k] / sum + eps;
    }
    normalize(c, s, 1, s, eps);
    for (int i = 1; i < iterations; i++) {
        normalize(c, s, s, 1, eps);
        normalize(c, s, 1, s, eps);
    }
}

struct Enter {
    const lm_hyper& site;
    const float* streams;
    const int64_t tokens;
    const float* mixes;  // [tokens][(2 + S) * S], not yet divided by the root mean square
    float *x, *post, *comb;
    Phase& phase;

    void run(int thread) {
        phase.run(thread, [&](int64_t t) { one(t); });
    }

    void one(int64_t t) {
        const int64_t s = site.streams, d = site.width, rows = (2 + s) * s;
        const float* v = streams + t * s * d;
        const float norm = 1.0f / std::sqrt(isa().sum_of_squares(v, s * d) / (s * d) + site.norm_eps);
        float mix[(2 + LM_MAX_STREAMS) * LM_MAX_STREAMS];
        for (int64_t i = 0; i < rows; i++) {
            const int part = i < s ? 0 : i < 2 * s ? 1 : 2;
            mix[i] = mixes[t * rows + i] * norm * site.scale[part] + site.base[i];
        }
        float* out = x + t * d;
        std::fill(out, out + d, 0.0f);
        for (int64_t j = 0; j < s; j++) {
            isa().add_scaled(sigmoid(mix[j]) + site.eps, v + j * d, d, out);
            post[t * s + j] = 2 * sigmoid(mix[s + j]);
        }
        std::copy(mix + 2 * s, mix + rows, comb + t * s * s);
        sinkhorn(comb + t * s * s, s, site.iterations, site.eps);
        isa().scale_by(1.0f / std::sqrt(isa().sum_of_squares(out, d) / d + site.norm_eps), site.norm, d, out);
    }
};

struct Leave {
    const int64_t s, d;
    const float *streams, *y, *post, *comb;
    float* out;
    Phase& phase;

    // One piece is kBlock elements of one stream of one token.
    int64_t pieces(int64_t tokens) const { return tokens * s * ((d + kBlock - 1) / kBlock); }

    void run(int thread) {
        const int64_t blocks = (d + kBlock - 1) / kBlock;
        phase.run(thread, [&](int64_t piece) {
            const int64_t t = piece / (s * blocks), k = piece / blocks % s, at = piece % blocks * kBlock;
            const int64_t n = std::min(kBlock, d - at);
            float* to = out + (t * s + k) * d + at;
            std::fill(to, to + n, 0.0f);
            isa().add_scaled(post[t * s + k], y + t * d + at, n, to);
            for (int64_t j = 0; j < s; j++)
                isa().add_scaled(comb[(t * s + j) * s + k], streams + (t * s + j) * d + at, n, to);
        });
    }
};

}  // namespace

int32_t hyper_enter(const lm_hyper& site, const float* streams, int64_t tokens, float* x, float* post, float* comb,
                    std::vector<ThreadMemory>& memory) {
    static Buffer& buffer = *new Buffer;
    const int64_t rows = (2 + site.streams) * site.streams, cols = site.streams * site.width;
    float* mixes = buffer.get<float>(tokens * rows);
    const lm_matrix fn = {site.fn, nullptr, nullptr, rows, cols, LM_F32, LM_SCALE_NONE, 0, 0};
    const int32_t status = linear(fn, 1, streams, tokens, mixes, LM_STRICT, memory);
    if (status != LM_OK) return status;
    static Phase phase;
    const int width = width_for(tokens * cols * sizeof(float), 1);
    phase.reset(tokens, width);
    Enter work{site, streams, tokens, mixes, x, post, comb, phase};
    run_on(width, work);
    return LM_OK;
}

int32_t hyper_leave(int64_t num_streams, int64_t width, const float* streams, const float* y, const float* post,
                    const float* comb, int64_t tokens, float* out) {
    static Phase phase;
    Leave work{num_streams, width, streams, y, post, comb, out, phase};
    const int threads = width_for(tokens * num_streams * width * sizeof(float), 1);
    phase.reset(work.pieces(tokens), threads);
    run_on(threads, work);
    return LM_OK;
}

}  // namespace lm
