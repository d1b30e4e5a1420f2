// The feed-forward half of a layer in one call: router, routed experts, shared expert; for few tokens.
#include <cmath>
#include <limits>

#include "work.h"

namespace lm {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Logits become scores.
void score(int32_t scoring, int64_t n, float* x) {
    if (scoring == LM_SOFTMAX) {
        float largest = kHidden;
        for (int64_t i = 0; i < n; i++) largest = std::max(largest, x[i]);
        const float total = isa().exponentials(largest, n, x);
        for (int64_t i = 0; i < n; i++) x[i] /= total;
    } else {
        for (int64_t i = 0; i < n; i++) x[i] = 1.0f / (1.0f + std::exp(-x[i]));
    }
}

// The number of the largest of n, NaN before all, of equal ones the first; what is taken is hidden.
int64_t take_largest(float* x, std::vector<char>& taken, int64_t n) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || x[i] > x[best] || (x[i] != x[i] && x[best] == x[best]))) best = i;
    taken[best] = 1;
    return best;
}

// Hides all experts but those of the `keep` best groups, a group's score being the sum of its `best` largest.
void choose_groups(const lm_moe_layer& layer, float* ranks, std::vector<char>& taken) {
    const int64_t size = layer.num_experts / layer.groups;
    std::vector<float> of_group(layer.groups, 0.0f);
    for (int64_t g = 0; g < layer.groups; g++) {
        taken.assign(size, 0);
        float* own = ranks + g * size;
        for (int32_t i = 0; i < layer.best; i++) of_group[g] += own[take_largest(own, taken, size)];
    }
    taken.assign(layer.groups, 0);
    for (int32_t i = 0; i < layer.keep; i++) take_largest(of_group.data(), taken, layer.groups);
    for (int64_t g = 0; g < layer.groups; g++)
        if (!taken[g]) std::fill(ranks + g * size, ranks + (g + 1) * size, kHidden);
}

// One token: logits to scores, then the experts and their weights.
void route(const lm_moe_layer& layer, float* scores, int64_t* ids, float* weights) {
    static std::vector<float>& ranks = *new std::vector<float>;
    static std::vector<char>& taken = *new std::vector<char>;
    const int64_t n = layer.num_experts;
    score(layer.scoring, n, scores);
    ranks.assign(scores, scores + n);
    if (layer.bias)
        for (int64_t i = 0; i < n; i++) ranks[i] += layer.bias[i];
    if (layer.groups > 1) choose_groups(layer, ranks.data(), taken);
    taken.assign(n, 0);
    for (int64_t k = 0; k < layer.top_k; k++) ids[k] = take_largest(ranks.data(), taken, n);
    float total = 1e-20f;
    for (int64_t k = 0; k < layer.top_k; k++) total += weights[k] = scores[ids[k]];
    for (int64_t k = 0; k < layer.top_k; k++)
        weights[k] = (layer.normalize ? weights[k] / total : weights[k]) * layer.scale;
}

}  // namespace

bool is_valid(const lm_moe_layer& l) {
    if (l.width < 1 || !l.norm || (!l.experts && !l.shared) || !l.experts != !l.gate) return false;
    if (!l.experts) return true;
    if (l.num_experts < 1 || l.top_k < 1 || l.top_k > l.num_experts || l.groups < 1 || l.num_experts % l.groups ||
        l.keep < 1 || l.keep > l.groups || l.best < 1 || l.best > l.num_experts / l.groups)
        return false;
    return is_valid(*l.gate) && l.gate->rows == l.num_experts && l.gate->cols == l.width;
}

int32_t moe(const lm_moe_layer& layer, const float* x, int64_t tokens, int64_t* ids, float* weights, float* y,
            int32_t mode, std::vector<ThreadMemory>& memory) {
    // Kept between calls, and never freed: see memory() in dispatch.cpp.
    static Buffer &normed = *new Buffer, &logits = *new Buffer;
    static std::vector<int64_t>& first = *new std::vector<int64_t>;
    static std::vector<float>& one = *new std::vector<float>;
    const int64_t d = layer.width, n = layer.num_experts;
    if (y != x) std::copy(x, x + tokens * d, y);
    float* to = normed.get<float>(tokens * d);
    norm_rope(y, layer.norm, layer.eps, nullptr, nullptr, tokens, 1, d, 0, to);
    x = to;
    if (layer.gate) {
        float* scores = logits.get<float>(tokens * n);
        linear(*layer.gate, 1, x, tokens, scores, layer.gate_mode, memory);
        for (int64_t t = 0; t < tokens; t++)
            route(layer, scores + t * n, ids + t * layer.top_k, weights + t * layer.top_k);
        const int32_t status =
            experts(layer.experts, n, layer.limit, x, tokens, d, ids, weights, layer.top_k, y, mode, memory);
        if (status) return status;
    }
    if (!layer.shared) return LM_OK;
    first.assign(tokens, 0);
    one.assign(tokens, 1.0f);
    return experts(layer.shared, 1, layer.limit, x, tokens, d, first.data(), one.data(), 1, y, mode, memory);
}

}  // namespace lm
