// AVX-512 with VBMI and BF16: Zen 4 and later, Sapphire Rapids and later. Compiled with those flags only.
#if defined(LM_BUILD_AVX512)
#define LM_AVX512
#include "kernels.inc"

namespace lm {
const Isa* isa_avx512() {
    static const Isa isa = {"avx512-bf16", true, pack, rows, decode, compare, swiglu,
                            add_scaled, exponentials, sum_of_squares, scale_by, read, round_group,
                            round_levels, round_book, round_book_fp4};
    return &isa;
}
}  // namespace lm
#else
#include "isa.h"
namespace lm {
const Isa* isa_avx512() { return nullptr; }
}  // namespace lm
#endif
