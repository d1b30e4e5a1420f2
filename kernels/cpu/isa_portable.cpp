// Plain C++ for every other processor; what it vectorizes is up to the compiler.
#include "kernels.inc"

namespace lm {
const Isa* isa_portable() {
    static const Isa isa = isa_of("portable", [](int, int64_t) { return Precision::f32; });
    return &isa;
}
}  // namespace lm
