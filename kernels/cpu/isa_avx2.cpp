// AVX2 with FMA: x86 machines since about 2013. Compiled with those flags only.
#if defined(LM_BUILD_AVX2)
#define LM_AVX2
#include "kernels.inc"

namespace lm {
const Isa* isa_avx2() {
    static const Isa isa = isa_of("avx2", [](int format, int64_t) {
        return has_int8(format) ? Precision::int8 : Precision::loose_f32;
    });
    return &isa;
}
}  // namespace lm
#else
#include "isa.h"
namespace lm {
const Isa* isa_avx2() { return nullptr; }
}  // namespace lm
#endif
