// AVX-512 with VBMI and BF16: Zen 4 and later, Sapphire Rapids and later. Compiled with those flags only.
#if defined(LM_BUILD_AVX512)
#define LM_AVX512
#include "kernels.inc"

namespace lm {
const Isa* isa_avx512() {
    static const Isa isa = isa_of("avx512-bf16", [](int, int64_t) { return Precision::bf16; });
    return &isa;
}
}  // namespace lm
#else
#include "isa.h"
namespace lm {
const Isa* isa_avx512() { return nullptr; }
}  // namespace lm
#endif
