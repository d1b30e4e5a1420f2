// A matrix times the activations of some tokens; rows are shared by all threads.
#include <memory>

#include "work.h"

namespace lm {
namespace {

struct Linear {
    const lm_matrix& w;
    const int64_t groups, tokens;
    const float* x;
    float* y;
    const Precision precision;
    const int64_t part_rows, parts_per_group;
    Packed inputs;
    std::vector<const void*> rows_of_x;  // [groups][tokens]
    ThreadMemory* memory;
    Barrier barrier;
    Queue& queue;

    void run(int thread) {
        for (int64_t i = thread; i < tokens * groups; i += threads())
            isa().pack(w.format, precision, x + i * w.cols, w.cols, inputs.data + i * inputs.bytes);
        barrier.wait();
        const int64_t group_rows = w.rows / groups;
        for (int64_t part; (part = queue.next(thread)) >= 0;) {
            const int64_t group = part / parts_per_group;
            const int64_t first = group * group_rows + part % parts_per_group * part_rows;
            const int64_t last = std::min(first + part_rows, (group + 1) * group_rows);
            isa().rows(w, precision, first, last, rows_of_x.data() + group * tokens, tokens, y + first, w.rows,
                       memory[thread].scratch());
        }
    }
};

}  // namespace

int32_t linear(const lm_matrix& w, int64_t groups, const float* x, int64_t tokens, float* y, int32_t mode,
               std::vector<ThreadMemory>& memory) {
    static Buffer buffer;
    static Queue queue;
    const Precision precise = precision(mode);
    const int64_t part_rows = std::min(rows_per_part(w, 1, threads()), (w.rows / groups + 31) / 32 * 32);
    const int64_t parts = (w.rows / groups + part_rows - 1) / part_rows;
    Linear work{w,     groups, tokens, x, y, precise, part_rows, parts, packed(buffer, tokens * groups, w.cols, precise),
                {},    memory.data(),  Barrier(threads()), queue};
    for (int64_t g = 0; g < groups; g++)
        for (int64_t t = 0; t < tokens; t++) work.rows_of_x.push_back(work.inputs.token(t * groups + g));
    queue.reset(parts * groups, threads());
    run_on_all(work);
    return LM_OK;
}

}  // namespace lm
