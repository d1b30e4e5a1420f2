// Layers of multi-head latent attention, for tokens that each extend a sequence of their own.
#include "work.h"

namespace lm {
namespace {

// Rows of `from` that are `step` apart, moved to rows that are `to_step` apart.
void move_rows(const float* from, int64_t step, int64_t rows, int64_t width, float* to, int64_t to_step) {
    for (int64_t r = 0; r < rows; r++) std::copy(from + r * step, from + r * step + width, to + r * to_step);
}

bool fits(const lm_matrix* m, int64_t rows, int64_t cols) {
    return m && is_valid(*m) && m->rows == rows && m->cols == cols;
}

// x [tokens, width] becomes x + attention(norm(x)). caches[t]: what token t's sequence has in this layer.
void attend(const lm_latent_layer& layer, int64_t tokens, const float* cos, const float* sin, float* const* caches,
            const int64_t* lengths, float* x, int32_t mode, std::vector<ThreadMemory>& memory) {
    // Kept between calls, and never freed: see memory() in dispatch.cpp.
    static Buffer* own = new Buffer[8];
    const int64_t d = layer.kv_a->cols, rank = layer.rank, nope = layer.nope, rope = layer.rope, heads = layer.heads;
    const int64_t head = nope + rope, row = rank + rope;
    // 1. Queries of all heads, their last elements turned.
    float* normed = own[0].get<float>(tokens * d);
    norm_rope(x, layer.norm, layer.eps, nullptr, nullptr, tokens, 1, d, 0, normed);
    const float* latent = normed;
    if (layer.q_a) {
        float *low = own[1].get<float>(2 * tokens * layer.q_a->rows), *low_normed = low + tokens * layer.q_a->rows;
        linear(*layer.q_a, 1, normed, tokens, low, mode, memory);
        norm_rope(low, layer.q_norm, layer.latent_eps, nullptr, nullptr, tokens, 1, layer.q_a->rows, 0, low_normed);
        latent = low_normed;
    }
    float *q = own[2].get<float>(2 * tokens * heads * head), *turned = q + tokens * heads * head;
    linear(*layer.q_b, 1, latent, tokens, q, mode, memory);
    norm_rope(q, nullptr, -1, cos, sin, tokens, heads, head, rope / 2, turned);
    // 2. The new row of each sequence's cache.
    float *kv = own[3].get<float>(2 * tokens * row + rank), *rows = kv + tokens * row, *kv_latent = rows + tokens * row;
    linear(*layer.kv_a, 1, normed, tokens, kv, mode, memory);
    for (int64_t t = 0; t < tokens; t++) {
        float* one = kv + t * row;
        norm_rope(one, layer.kv_norm, layer.latent_eps, nullptr, nullptr, 1, 1, rank, 0, kv_latent);
        std::copy(kv_latent, kv_latent + rank, one);
    }
    norm_rope(kv, nullptr, -1, cos, sin, tokens, 1, row, rope / 2, rows);
    for (int64_t t = 0; t < tokens; t++)
        std::copy(rows + t * row, rows + (t + 1) * row, caches[t] + (lengths[t] - 1) * row);
    // 3. Queries take up the projection of the keys; attention; what is found takes up that of the values.
    float *plain = own[4].get<float>(tokens * heads * nope), *absorbed = own[5].get<float>(2 * tokens * heads * row);
    float *keys = absorbed + tokens * heads * row, *found = own[6].get<float>(tokens * heads * rank);
    move_rows(turned, head, tokens * heads, nope, plain, nope);
    linear(*layer.keys, heads, plain, tokens, keys, mode, memory);
    move_rows(keys, rank, tokens * heads, rank, absorbed, row);
    move_rows(turned + nope, head, tokens * heads, rope, absorbed + rank, row);
    for (int64_t t = 0; t < tokens; t++)
        latent_attend(absorbed + t * heads * row, caches[t], LM_F32, lengths[t], heads, row, rank, layer.scale,
                      found + t * heads * rank, memory);
    float *values = own[7].get<float>(tokens * layer.values->rows);
    linear(*layer.values, heads, found, tokens, values, mode, memory);
    // 4. Back to the residual.
    float* y = normed;
    linear(*layer.out, 1, values, tokens, y, mode, memory);
    for (int64_t i = 0; i < tokens * d; i++) x[i] += y[i];
}

}  // namespace

bool is_valid(const lm_latent_layer& l) {
    if (l.feed && (!is_valid(*l.feed) || !l.kv_a || l.feed->width != l.kv_a->cols)) return false;
    if (!l.kv_a || !l.q_b || !l.values || !l.norm || !l.kv_norm || (l.q_a && !l.q_norm)) return false;
    if (l.heads < 1 || l.rank < 1 || l.nope < 1 || l.rope < 0 || l.rope % 2 ||
        l.rank + l.rope > kMaxCols || l.values->rows % l.heads) return false;
    const int64_t d = l.kv_a->cols, queries = l.q_a ? l.q_a->rows : d;
    return (!l.q_a || fits(l.q_a, queries, d)) && fits(l.q_b, l.heads * (l.nope + l.rope), queries) &&
           fits(l.kv_a, l.rank + l.rope, d) && fits(l.keys, l.heads * l.rank, l.nope) &&
           fits(l.values, l.values->rows, l.rank) && fits(l.out, d, l.values->rows);
}

int32_t latent_layers(const lm_latent_layer* const* layers, int64_t num_layers, float* x, int64_t tokens,
                      const float* cos, const float* sin, float* const* caches, const int64_t* lengths, int32_t mode,
                      std::vector<ThreadMemory>& memory) {
    static std::vector<int64_t>& ids = *new std::vector<int64_t>;
    static std::vector<float>& weights = *new std::vector<float>;
    for (int64_t i = 0; i < num_layers; i++) {
        attend(*layers[i], tokens, cos, sin, caches + i * tokens, lengths, x, mode, memory);
        const lm_moe_layer* feed = layers[i]->feed;
        if (!feed) continue;
        ids.resize(tokens * feed->top_k);
        weights.resize(ids.size());
        const int32_t status = moe(*feed, x, tokens, ids.data(), weights.data(), x, mode, memory);
        if (status) return status;
    }
    return LM_OK;
}

}  // namespace lm
