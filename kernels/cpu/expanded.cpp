// Attention of many queries of multi-head latent attention over a block of keys, which each head has of its own.
//
// Everything is a product of packed rows: scores are the keys, as a matrix, times the queries; sums are the weights of
// some queries, as a matrix, times the values of each dimension. That way round, weights of fewer keys than the block
// has are a matrix in one piece.
#include <cmath>
#include <cstring>
#include <limits>

#include "work.h"

namespace lm {
namespace {

// Queries of a piece: of the last keys of so many, half are hidden from one on average.
constexpr int64_t kQueries = 96;
// Keys of a piece of packing, and what rows of weights are padded to: a block of both formats.
constexpr int64_t kKeys = 64;
constexpr float kLog2E = 1.44269504f;
static_assert(block_size(LM_BF16) == kKeys && block_size(LM_F32) == kKeys, "rows are padded to whole blocks");
static_assert(kKeys <= kQueries, "columns of values fit where sums do");

int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Expanded {
    const lm_expanded& a;
    const int format;
    const Precision precision;
    char* const keys;     // [heads, keys] rows of key_cols()
    const Packed values;  // [heads, value_width] rows of whole(keys, kKeys)
    const void* const* const value_rows;
    ThreadMemory* memory;
    struct Phases {
        Phase packing, attention;
    } & phases;

    int64_t key_width() const { return a.nope + a.rope; }
    int64_t key_cols() const { return whole(key_width(), kKeys); }
    char* head_keys(int64_t head) const { return keys + head * a.keys * row_bytes(format, key_cols()); }

    // Blocks of keys; and of queries, of which the first ones may see no key of this call.
    int64_t key_blocks() const { return (a.keys + kKeys - 1) / kKeys; }
    int64_t first_block() const { return std::max<int64_t>(a.at - a.first, 0) / kQueries; }
    int64_t query_blocks() const { return (a.queries + kQueries - 1) / kQueries - first_block(); }

    // One cache line more than needed, so that rows do not share cache sets.
    int64_t score_stride() const { return whole(a.keys, kKeys) + 16; }
    int64_t first_output() const { return sizeof(float) * std::max(kQueries * score_stride(), key_width()); }
    int64_t packed_queries() const { return kQueries * (row_bytes(format, key_cols()) + 64); }
    int64_t second_output() const {
        const int64_t sums = sizeof(float) * kQueries * a.value_width;
        return packed_queries() + kQueries * row_bytes(format, whole(a.keys, kKeys)) + sums;
    }

    void run(int thread) {
        phases.packing.run(thread, [&](int64_t piece) {
            pack(piece / key_blocks(), piece % key_blocks() * kKeys, memory[thread]);
        });
        phases.attention.run(thread, [&](int64_t piece) {
            attend(piece / query_blocks(), (first_block() + piece % query_blocks()) * kQueries, memory[thread]);
        });
    }

    // Keys as rows, and values as rows of all keys of a dimension.
    void pack(int64_t head, int64_t first, ThreadMemory& mine) const {
        const int64_t n = std::min(kKeys, a.keys - first), width = a.nope + a.value_width, stride = a.heads * width;
        const float* from = a.expanded + first * stride + head * width;
        float* key = mine.outputs[0].get<float>(key_width());
        char* to = head_keys(head) + first * row_bytes(format, key_cols());
        for (int64_t i = 0; i < n; i++, to += row_bytes(format, key_cols())) {
            std::memcpy(key, from + i * stride, a.nope * sizeof(float));
            std::memcpy(key + a.nope, a.rotated + (first + i) * a.rotated_stride, a.rope * sizeof(float));
            isa().pack(format, precision, key, key_width(), to);
        }
        float* columns = mine.outputs[1].get<float>(a.value_width * kKeys);
        isa().transpose(from + a.nope, n, a.value_width, stride, columns, kKeys);
        char* row = values.data + head * a.value_width * values.bytes + row_bytes(format, first);
        for (int64_t d = 0; d < a.value_width; d++, row += values.bytes)
            isa().pack(format, precision, columns + d * kKeys, n, row);
    }

    void attend(int64_t head, int64_t first, ThreadMemory& mine) const {
        const int64_t n = std::min(kQueries, a.queries - first), last = a.first + first + n;
        const int64_t seen = std::min(a.keys, last - a.at), cols = whole(seen, kKeys);
        float* scores = mine.outputs[0].get<float>(first_output() / sizeof(float));
        char* packed_query = mine.outputs[1].get<char>(second_output());
        char* weights = packed_query + packed_queries();
        float* sums = reinterpret_cast<float*>(weights + kQueries * row_bytes(format, cols));

        const void* inputs[kQueries];
        for (int64_t t = 0; t < n; t++, packed_query += row_bytes(format, key_cols()) + 64) {
            const float* query = a.q + ((first + t) * a.heads + head) * key_width();
            isa().pack(format, precision, query, key_width(), packed_query);
            inputs[t] = packed_query;
        }
        const lm_matrix of_keys = matrix(head_keys(head), a.keys, key_cols());
        isa().rows(of_keys, precision, 0, seen, inputs, n, scores, score_stride(), mine.scratch());

        float kept[kQueries], inverse[kQueries];
        for (int64_t t = 0; t < n; t++) {
            float* row = scores + t * score_stride();
            const int64_t state = head * a.queries + first + t;
            kept[t] = weigh(row, std::min(seen, a.first + first + t + 1 - a.at), cols, a.top[state], a.total[state]);
            inverse[t] = 1 / a.total[state];
            isa().pack(format, precision, row, cols, weights + t * row_bytes(format, cols));
        }
        isa().rows(matrix(weights, n, cols), precision, 0, n, value_rows + head * a.value_width, a.value_width, sums,
                   kQueries, mine.scratch());

        const bool ends = a.at + a.keys >= last;
        float* before = a.sums + head * a.value_width * a.queries + first;
        for (int64_t d = 0; d < a.value_width; d++, before += a.queries) {
            float* sum = sums + d * kQueries;
            if (a.at > 0) {
                isa().scale_by(1, kept, n, before);
                isa().add_scaled(1, before, n, sum);
            }
            if (ends) isa().scale_by(1, inverse, n, sum);
            else std::memcpy(before, sum, n * sizeof(float));
        }
        if (ends)
            isa().transpose(sums, a.value_width, n, kQueries, a.out + (first * a.heads + head) * a.value_width,
                            a.heads * a.value_width);
    }

    // Scores become weights, those of hidden keys 0; returns what the sums so far are scaled with.
    float weigh(float* scores, int64_t visible, int64_t cols, float& top, float& total) const {
        if (visible < 1) {
            std::fill(scores, scores + cols, 0.0f);
            return 1;
        }
        const int64_t lanes = whole(visible, 16);
        std::fill(scores + visible, scores + lanes, -std::numeric_limits<float>::infinity());
        std::fill(scores + lanes, scores + cols, 0.0f);
        float largest = a.at > 0 ? top : -std::numeric_limits<float>::infinity();
        const float before = largest, sum = isa().weigh(a.scale * kLog2E, &largest, lanes, scores);
        const float kept = a.at > 0 ? std::exp2(before - largest) : 0;
        total = a.at > 0 ? total * kept + sum : sum;
        top = largest;
        return kept;
    }

    lm_matrix matrix(const void* data, int64_t rows, int64_t cols) const {
        return {data, nullptr, nullptr, rows, cols, format, LM_SCALE_NONE, 0, 0};
    }
};

}  // namespace

int32_t expanded_attend(const lm_expanded& a, std::vector<ThreadMemory>& memory) {
    // Kept between calls, and never freed: see memory() in dispatch.cpp.
    static Buffer &keys = *new Buffer, &values = *new Buffer, &rows = *new Buffer;
    static Expanded::Phases phases;
    const int format = isa().fast(LM_BF16, kQueries) == Precision::bf16 ? LM_BF16 : LM_F32;
    const Precision precision = isa().fast(format, kQueries);
    const int64_t key_bytes = row_bytes(format, whole(a.nope + a.rope, kKeys)), dims = a.heads * a.value_width;
    char* packed_keys = keys.get<char>(a.heads * a.keys * key_bytes);
    const Packed packed_values = packed(values, dims, a.keys, precision);
    const void** value_rows = rows.get<const void*>(dims);
    for (int64_t d = 0; d < dims; d++) value_rows[d] = packed_values.token(d);
    Expanded work{a, format, precision, packed_keys, packed_values, value_rows, memory.data(), phases};
    const int64_t pieces = a.heads * work.query_blocks();
    const int width = static_cast<int>(std::min<int64_t>(pieces, threads()));
    prepare(memory, width, std::max(work.first_output(), work.second_output()));
    phases.packing.reset(a.heads * work.key_blocks(), width);
    phases.attention.reset(pieces, width);
    run_on(width, work);
    return LM_OK;
}

}  // namespace lm
