// Plain C++ for every other processor; what it vectorizes is up to the compiler.
#include "kernels.inc"

namespace lm {
const Isa* isa_portable() {
    static const Isa isa = {"portable", false, pack, rows, decode, compare, swiglu,
                            add_scaled, exponentials, sum_of_squares, scale_by, read, round_group,
                            round_levels, round_book, round_book_fp4};
    return &isa;
}
}  // namespace lm
