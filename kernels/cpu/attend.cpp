// Attention of a single query: what a decode step does in every layer, on all threads.
#include <cmath>

#include "work.h"

namespace lm {
namespace {

// Heads of a piece: they share what is loaded of the keys.
constexpr int64_t kHeads = 4;

struct Attend {
    const float *q, *window, *entries, *bias, *sink;
    const int64_t window_rows, entry_rows, heads, width;
    const float scale;
    float* out;
    ThreadMemory* memory;
    Phase& phase;

    void run(int thread) {
        phase.run(thread, [&](int64_t piece) { some_heads(piece * kHeads, memory[thread]); });
    }

    void some_heads(int64_t first, ThreadMemory& mine) {
        const int64_t count = std::min(kHeads, heads - first), keys = window_rows + entry_rows;
        float* scores = mine.outputs[0].get<float>(count * keys);
        // The kernels read inputs in blocks of 64.
        const Packed packed_q = packed(mine.outputs[1], count, width, Precision::f32);
        const void* rows[kHeads];
        for (int64_t h = 0; h < count; h++) {
            isa().pack(LM_F32, Precision::f32, q + (first + h) * width, width, packed_q.data + h * packed_q.bytes);
            rows[h] = packed_q.token(h);
        }
        products(window, window_rows, rows, count, scores, keys, mine);
        products(entries, entry_rows, rows, count, scores + window_rows, keys, mine);
        for (int64_t h = 0; h < count; h++) one_head(first + h, scores + h * keys);
    }

    void products(const float* keys, int64_t n, const void* const* rows, int64_t count, float* scores, int64_t stride,
                  ThreadMemory& mine) const {
        const lm_matrix matrix = {keys, nullptr, nullptr, n, width, LM_F32, LM_SCALE_NONE, 0, 0};
        if (n) isa().rows(matrix, Precision::f32, 0, n, rows, count, scores, stride, mine.scratch());
    }

    void one_head(int64_t head, float* scores) {
        const int64_t keys = window_rows + entry_rows;
        float largest = sink[head];
        for (int64_t n = 0; n < keys; n++) {
            scores[n] *= scale;
            if (bias && n >= window_rows) scores[n] += bias[n - window_rows];
            if (scores[n] > largest) largest = scores[n];
        }
        const float total = isa().exponentials(largest, keys, scores) + std::exp(sink[head] - largest);
        float* to = out + head * width;
        std::fill(to, to + width, 0.0f);
        for (int64_t n = 0; n < keys; n++) {
            const float* key = n < window_rows ? window + n * width : entries + (n - window_rows) * width;
            if (scores[n] != 0) isa().add_scaled(scores[n] / total, key, width, to);
        }
    }
};

}  // namespace

int32_t attend(const float* q, const float* window, int64_t window_rows, const float* entries, int64_t entry_rows,
               const float* bias, const float* sink, int64_t heads, int64_t width, float scale, float* out,
               std::vector<ThreadMemory>& memory) {
    static Phase phase;
    const int threads = width_for((window_rows + entry_rows) * width * sizeof(float), heads);
    prepare(memory, threads, kHeads * sizeof(float) * std::max(window_rows + entry_rows, width + 256));
    phase.reset((heads + kHeads - 1) / kHeads, threads);
    Attend work{q,           window,     entries, bias,  sink,  window_rows,
                entry_rows, heads,      width,   scale, out,   memory.data(), phase};
    run_on(threads, work);
    return LM_OK;
}

}  // namespace lm
