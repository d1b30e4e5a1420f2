// A matrix times the activations of some tokens; rows are shared by all threads.
#include "work.h"

namespace lm {
namespace {

struct Linear {
    const lm_matrix& w;
    const int64_t groups, tokens;
    const float* x;
    float* y;
    const Precision precision;
    const int64_t piece_rows, pieces_per_group;
    Packed inputs;
    std::vector<const void*> rows_of_x;  // [groups][tokens]
    ThreadMemory* memory;
    Phase &packing, &products;

    void run(int thread) {
        packing.run(thread, [&](int64_t i) {
            isa().pack(w.format, precision, x + i * w.cols, w.cols, inputs.data + i * inputs.bytes);
        });
        const int64_t group_rows = w.rows / groups;
        products.run(thread, [&](int64_t piece) {
            const int64_t group = piece / pieces_per_group;
            const int64_t first = group * group_rows + piece % pieces_per_group * piece_rows;
            const int64_t last = std::min(first + piece_rows, (group + 1) * group_rows);
            isa().rows(w, precision, first, last, rows_of_x.data() + group * tokens, tokens, y + first, w.rows,
                       memory[thread].scratch());
        });
    }
};

}  // namespace

int32_t linear(const lm_matrix& w, int64_t groups, const float* x, int64_t tokens, float* y, int32_t mode,
               std::vector<ThreadMemory>& memory) {
    static Buffer& buffer = *new Buffer;
    static Phase packing, products;
    const Precision precise = precision(mode, w.format, tokens);
    const int width = width_for(w.rows * row_bytes(w), tokens);
    const int64_t piece_rows = std::min(rows_per_piece(w, 1, width, tokens), (w.rows / groups + 31) / 32 * 32);
    const int64_t pieces = (w.rows / groups + piece_rows - 1) / piece_rows;
    const Packed inputs = packed(buffer, tokens * groups, w.cols, precise);
    Linear work{w, groups, tokens, x, y, precise, piece_rows, pieces, inputs, {}, memory.data(), packing, products};
    for (int64_t g = 0; g < groups; g++)
        for (int64_t t = 0; t < tokens; t++) work.rows_of_x.push_back(work.inputs.token(t * groups + g));
    prepare(memory, width, 0);
    packing.reset(tokens * groups, width);
    products.reset(pieces * groups, width);
    run_on(width, work);
    return LM_OK;
}

}  // namespace lm
