// AVX-512 with VNNI as well: products of weights of 4 and 8 bits in int8, the others in bf16. Compiled with those flags
// only. Apart from isa_avx512.cpp, so that nothing there can come to need VNNI.
#if defined(LM_BUILD_AVX512_VNNI)
#define LM_AVX512
#define LM_VNNI
#include "kernels.inc"

namespace lm {
const Isa* isa_avx512_vnni() {
    static const Isa isa =
        isa_of("avx512-vnni", [](int format, int64_t) { return has_int8(format) ? Precision::int8 : Precision::bf16; });
    return &isa;
}
}  // namespace lm
#else
#include "isa.h"
namespace lm {
const Isa* isa_avx512_vnni() { return nullptr; }
}  // namespace lm
#endif
