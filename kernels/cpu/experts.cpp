// One MoE layer: tokens grouped by expert, gate and up, SwiGLU, down, weighted sum; one job with four phases.
//
// A phase's pieces are rows of one expert (first half) or rows of the output for all experts (second half), so no two
// threads ever write the same place, and each token's terms are added in order of expert id.
#include <numeric>

#include "work.h"

namespace lm {
namespace {

// Pairs (token, expert) in order of expert; an expert's pairs are neighbours.
struct Pairs {
    std::vector<int64_t> token;
    std::vector<float> weight;
    struct Span {
        int64_t expert, first, last;
    };
    std::vector<Span> spans;  // of chosen experts
    std::vector<char> used;   // of each token: whether it has a pair

    void group(const int64_t* ids, const float* weights, int64_t tokens, int64_t top_k, int64_t num_experts) {
        std::vector<int64_t> start(num_experts + 1, 0);
        used.assign(tokens, 0);
        for (int64_t i = 0; i < tokens * top_k; i++) {
            if (ids[i] < 0) continue;
            start[ids[i] + 1]++;
            used[i / top_k] = 1;
        }
        std::partial_sum(start.begin(), start.end(), start.begin());
        const int64_t count = start[num_experts];
        spans.clear();
        for (int64_t e = 0; e < num_experts; e++)
            if (start[e] < start[e + 1]) spans.push_back({e, start[e], start[e + 1]});
        token.resize(count);
        weight.resize(count);
        for (int64_t i = 0; i < tokens * top_k; i++) {
            if (ids[i] < 0) continue;
            const int64_t at = start[ids[i]]++;
            token[at] = i / top_k;
            weight[at] = weights[i];
        }
    }
};

struct Experts {
    const lm_matrix* table;
    const lm_matrix &up, &down;  // shapes: up [F, D], down [D, F]
    const float limit;
    const float* x;
    const int64_t tokens;
    float* y;
    const Precision up_precision, down_precision;
    const Pairs& pairs;
    Packed inputs, hidden_packed;
    float* hidden;  // [pairs][F]
    std::vector<const void*> input_rows, hidden_rows;
    const int64_t up_rows, down_rows;  // of a piece
    ThreadMemory* memory;
    struct Phases {
        Phase packing, up, packing_hidden, down;
    } & phases;

    void run(int thread) {
        ThreadMemory& mine = memory[thread];
        phases.packing.run(thread, [&](int64_t t) {
            if (!pairs.used[t]) return;
            isa().pack(up.format, up_precision, x + t * up.cols, up.cols, inputs.data + t * inputs.bytes);
        });
        const int64_t pieces = (up.rows + up_rows - 1) / up_rows;
        phases.up.run(thread, [&](int64_t piece) {
            gate_and_up(pairs.spans[piece / pieces], piece % pieces * up_rows, mine);
        });
        phases.packing_hidden.run(thread, [&](int64_t p) {
            isa().pack(down.format, down_precision, hidden + p * up.rows, up.rows,
                       hidden_packed.data + p * hidden_packed.bytes);
        });
        phases.down.run(thread, [&](int64_t piece) { down_and_add(piece * down_rows, mine); });
    }

    void gate_and_up(const Pairs::Span& span, int64_t first, ThreadMemory& mine) {
        const int64_t last = std::min(first + up_rows, up.rows), n = last - first, count = span.last - span.first;
        float *gate = mine.outputs[0].get<float>(count * n), *ups = mine.outputs[1].get<float>(count * n);
        const void* const* rows = input_rows.data() + span.first;
        const lm_matrix* expert = table + 3 * span.expert;
        isa().rows(expert[0], up_precision, first, last, rows, count, gate, n, mine.scratch());
        isa().rows(expert[2], up_precision, first, last, rows, count, ups, n, mine.scratch());
        for (int64_t i = 0; i < count; i++)
            isa().swiglu(gate + i * n, ups + i * n, limit, n, hidden + (span.first + i) * up.rows + first);
    }

    void down_and_add(int64_t first, ThreadMemory& mine) {
        const int64_t last = std::min(first + down_rows, down.rows), n = last - first;
        for (const auto& span : pairs.spans) {
            const int64_t count = span.last - span.first;
            float* out = mine.outputs[0].get<float>(count * n);
            isa().rows(table[3 * span.expert + 1], down_precision, first, last, hidden_rows.data() + span.first, count, out,
                       n, mine.scratch());
            for (int64_t i = 0; i < count; i++) {
                const int64_t pair = span.first + i;
                isa().add_scaled(pairs.weight[pair], out + i * n, n, y + pairs.token[pair] * down.rows + first);
            }
        }
    }
};

bool same_shape(const lm_matrix& a, const lm_matrix& b) {
    return a.rows == b.rows && a.cols == b.cols && a.format == b.format;
}

// True if all chosen experts are valid, alike and of the width of the inputs; model: the first of them, null for none.
bool check(const lm_matrix* experts, int64_t num_experts, int64_t width, const int64_t* ids, int64_t count,
           const lm_matrix*& model) {
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] == -1) continue;
        if (ids[i] < 0 || ids[i] >= num_experts) return false;
        const lm_matrix* e = experts + 3 * ids[i];
        if (!is_valid(e[0]) || !is_valid(e[1]) || !is_valid(e[2])) return false;
        if (!model) model = e;
        if (!same_shape(e[0], e[2]) || !same_shape(e[0], model[0]) || !same_shape(e[1], model[1])) return false;
        if (e[0].rows != e[1].cols || e[0].cols != e[1].rows || e[0].cols != width) return false;
    }
    return true;
}

}  // namespace

int32_t experts(const lm_matrix* table, int64_t num_experts, float limit, const float* x, int64_t tokens,
                int64_t input_width, const int64_t* ids, const float* weights, int64_t top_k, float* y, int32_t mode,
                std::vector<ThreadMemory>& memory) {
    // Kept between calls, and never freed: see memory() in dispatch.cpp.
    static Buffer &inputs = *new Buffer, &hidden = *new Buffer, &hidden_packed = *new Buffer;
    static Experts::Phases phases;
    static Pairs& pairs = *new Pairs;
    const lm_matrix* model = nullptr;
    if (!check(table, num_experts, input_width, ids, tokens * top_k, model)) return LM_BAD_ARGUMENT;
    if (!model) return LM_OK;
    pairs.group(ids, weights, tokens, top_k, num_experts);
    const int64_t count = pairs.token.size();
    const int64_t d = model->cols, f = model->rows, chosen = pairs.spans.size();
    // Not by the pairs of this call: experts that come from disk are computed as they come, with the same bits.
    const int64_t each = (tokens * top_k + num_experts - 1) / num_experts;
    const Precision up_precise = precision(mode, model[0].format, each);
    const Precision down_precise = precision(mode, model[1].format, each);
    const int width = width_for(chosen * 3 * f * row_bytes(model[0]), (count + chosen - 1) / chosen);
    Experts work{table,
                 model[0],
                 model[1],
                 limit,
                 x,
                 tokens,
                 y,
                 up_precise,
                 down_precise,
                 pairs,
                 packed(inputs, tokens, d, up_precise),
                 packed(hidden_packed, count, f, down_precise),
                 hidden.get<float>(count * f),
                 {},
                 {},
                 rows_per_piece(model[0], 2 * chosen, width, tokens),
                 rows_per_piece(model[1], 1, width, tokens),
                 memory.data(),
                 phases};
    for (int64_t p = 0; p < count; p++) {
        work.input_rows.push_back(work.inputs.token(pairs.token[p]));
        work.hidden_rows.push_back(work.hidden_packed.token(p));
    }
    int64_t most = 0;  // pairs of one expert
    for (const auto& span : pairs.spans) most = std::max(most, span.last - span.first);
    prepare(memory, width, most * std::max(work.up_rows, work.down_rows) * sizeof(float));
    phases.packing.reset(tokens, width);
    phases.up.reset((f + work.up_rows - 1) / work.up_rows * chosen, width);
    phases.packing_hidden.reset(count, width);
    phases.down.reset((d + work.down_rows - 1) / work.down_rows, width);
    run_on(width, work);
    return LM_OK;
}

}  // namespace lm
