// Attention of a single query of multi-head latent attention: all heads read the same rows, from memory once.
#include <cmath>
#include <limits>

#include "work.h"

namespace lm {
namespace {

// Heads of a piece, and rows: a piece ends with a sum of its own, so it should be much larger than that.
constexpr int64_t kHeads = 8;
constexpr int64_t kRows = 512;
// Rows of a block, which stay in the second-level cache between scores and sums.
constexpr int64_t kBlock = 128;

// Of one head over the rows of a piece; followed by value_width sums, not yet divided by the total.
struct Part {
    float largest, total;
    float* sums() { return reinterpret_cast<float*>(this + 1); }
};

struct LatentAttend {
    const void* cache;
    const int32_t format;
    const int64_t rows, heads, width, value_width;
    const Packed packed_q;  // times the scale
    char* parts;            // [rows / kRows][heads], part_bytes each
    const int64_t part_bytes;
    float* out;
    ThreadMemory* memory;
    struct Phases {
        Phase pieces, heads;
    } & phases;

    int64_t chunks() const { return (rows + kRows - 1) / kRows; }
    int64_t groups() const { return (heads + kHeads - 1) / kHeads; }
    Part& part(int64_t chunk, int64_t head) const {
        return *reinterpret_cast<Part*>(parts + (chunk * heads + head) * part_bytes);
    }

    void run(int thread) {
        phases.pieces.run(thread, [&](int64_t piece) {
            some_heads(piece / groups(), piece % groups() * kHeads, memory[thread]);
        });
        phases.heads.run(thread, [&](int64_t head) { finish(head); });
    }

    void some_heads(int64_t chunk, int64_t first, ThreadMemory& mine) const {
        const int64_t count = std::min(kHeads, heads - first);
        const void* queries[kHeads];
        for (int64_t h = 0; h < count; h++) {
            queries[h] = packed_q.token(first + h);
            Part& own = part(chunk, first + h);
            own.largest = -std::numeric_limits<float>::infinity();
            own.total = 0;
            std::fill(own.sums(), own.sums() + value_width, 0.0f);
        }
        const int64_t end = std::min((chunk + 1) * kRows, rows);
        for (int64_t at = chunk * kRows; at < end; at += kBlock) {
            const int64_t n = std::min(kBlock, end - at);
            const float* keys = block(at, n, mine);
            float scores[kHeads * kBlock];
            const lm_matrix matrix = {keys, nullptr, nullptr, n, width, LM_F32, LM_SCALE_NONE, 0, 0};
            isa().rows(matrix, Precision::f32, 0, n, queries, count, scores, kBlock, mine.scratch());
            for (int64_t h = 0; h < count; h++) weigh(part(chunk, first + h), scores + h * kBlock, n);
            isa().add_weighted(scores, kBlock, count, keys, n, width, value_width, part(chunk, first).sums(),
                               part_bytes / sizeof(float));
        }
    }

    // Rows of the cache in float32.
    const float* block(int64_t at, int64_t n, ThreadMemory& mine) const {
        if (format == LM_F32) return static_cast<const float*>(cache) + at * width;
        const lm_matrix matrix = {cache, nullptr, nullptr, rows, width, format, LM_SCALE_NONE, 0, 0};
        float* keys = mine.outputs[0].get<float>(kBlock * width);
        isa().decode(matrix, at, at + n, keys, mine.scratch());
        return keys;
    }

    // Scores become weights, and what was summed so far is scaled to the new maximum.
    void weigh(Part& own, float* scores, int64_t n) const {
        float largest = own.largest;
        for (int64_t i = 0; i < n; i++)
            if (scores[i] > largest) largest = scores[i];
        const float kept = own.largest < largest ? std::exp(own.largest - largest) : 1.0f;
        own.total = own.total * kept + isa().exponentials(largest, n, scores);
        if (kept != 1.0f)
            for (int64_t i = 0; i < value_width; i++) own.sums()[i] *= kept;
        own.largest = largest;
    }

    void finish(int64_t head) const {
        float largest = -std::numeric_limits<float>::infinity(), total = 0;
        for (int64_t c = 0; c < chunks(); c++) largest = std::max(largest, part(c, head).largest);
        for (int64_t c = 0; c < chunks(); c++) total += part(c, head).total * std::exp(part(c, head).largest - largest);
        float* to = out + head * value_width;
        std::fill(to, to + value_width, 0.0f);
        for (int64_t c = 0; c < chunks(); c++) {
            Part& own = part(c, head);
            isa().add_scaled(std::exp(own.largest - largest) / total, own.sums(), value_width, to);
        }
    }
};

}  // namespace

int32_t latent_attend(const float* q, const void* cache, int32_t format, int64_t rows, int64_t heads, int64_t width,
                      int64_t value_width, float scale, float* out, std::vector<ThreadMemory>& memory) {
    // Kept between calls, and never freed: see memory() in dispatch.cpp.
    static Buffer &queries = *new Buffer, &scaled = *new Buffer, &parts = *new Buffer;
    static LatentAttend::Phases phases;
    const int threads = width_for(rows * row_bytes(format, width), heads);
    const Packed packed_q = packed(queries, heads, width, Precision::f32);
    float* row = scaled.get<float>(width);
    for (int64_t h = 0; h < heads; h++) {
        std::transform(q + h * width, q + (h + 1) * width, row, [=](float x) { return x * scale; });
        isa().pack(LM_F32, Precision::f32, row, width, packed_q.data + h * packed_q.bytes);
    }
    const int64_t part_bytes = sizeof(Part) + value_width * sizeof(float), chunks = (rows + kRows - 1) / kRows;
    prepare(memory, threads, format == LM_F32 ? 0 : kBlock * width * sizeof(float));
    char* own = parts.get<char>(chunks * heads * part_bytes);
    LatentAttend work{cache, format,     rows, heads,         width, value_width, packed_q,
                      own,   part_bytes, out,  memory.data(), phases};
    phases.pieces.reset(chunks * work.groups(), threads);
    phases.heads.reset(heads, threads);
    run_on(threads, work);
    return LM_OK;
}

}  // namespace lm
