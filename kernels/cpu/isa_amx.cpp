// AMX: products of many tokens in bf16, in tiles; all else as AVX-512 has it, with or without VNNI. Compiled with those flags only.
#if defined(LM_BUILD_AMX)
#define LM_AVX512
#define LM_VNNI
#include "kernels.inc"

namespace lm {
namespace {
// Bytes of a row and rows of each tile, as the processor wants them. Constants: what the compiler is told of the
// instruction that loads them is not that it reads all of them.
struct AmxShapes {
    alignas(64) uint8_t bytes[64] = {1};
    constexpr AmxShapes(const uint8_t (&row_bytes)[8], const uint8_t (&rows)[8]) {
        for (int tile = 0; tile < 8; tile++) bytes[16 + 2 * tile] = row_bytes[tile], bytes[48 + tile] = rows[tile];
    }
};

// While it lives, this thread's tiles have such shapes.
struct AmxTiles {
    explicit AmxTiles(const AmxShapes& shapes) { _tile_loadconfig(shapes.bytes); }
    ~AmxTiles() { _tile_release(); }
};

#include "amx_bf16.inc"

// Tokens; decoding weights into tiles pays for more (measured: 1.1 to 1.5 times as fast at 6). Products in int8, where
// there are any, are as fast up to 8.
constexpr int64_t kFewAmx = 4;

Precision fast(int format, int64_t tokens) {
    return tokens > kFewTokens ? Precision::bf16 : isa_avx512_vnni()->fast(format, tokens);
}

void rows_amx(const lm_matrix& m, Precision precision, int64_t first, int64_t last, const void* const* x,
              int64_t tokens, float* out, int64_t stride, const Scratch& scratch) {
    if (precision != Precision::bf16 || tokens <= kFewAmx) {
        // That with VNNI takes weights of 4 and 8 bits in int8 or float32 only.
        const Isa* other = precision == Precision::bf16 ? isa_avx512() : isa_avx512_vnni();
        return other->rows(m, precision, first, last, x, tokens, out, stride, scratch);
    }
    decltype(&tokens_amx<LM_F32>) by_format[] = {tokens_amx<LM_F32>,  tokens_amx<LM_BF16>, tokens_amx<LM_FP8>,
                                                 tokens_amx<LM_FP4>,  tokens_amx<LM_INT8>, tokens_amx<LM_INT4>,
                                                 tokens_amx<LM_NF4>,  tokens_amx<LM_BOOK3>, tokens_amx<LM_BOOK2>};
    by_format[m.format](m, first, last, (const uint16_t* const*)x, tokens, out, stride, scratch);
}

}  // namespace

const Isa* isa_amx() {
    if (!isa_avx512() || !isa_avx512_vnni()) return nullptr;
    static const Isa isa = [] {
        Isa own = *isa_avx512_vnni();
        own.name = "amx", own.fast = fast, own.rows = rows_amx;
        return own;
    }();
    return &isa;
}
}  // namespace lm
#else
#include "isa.h"
namespace lm {
const Isa* isa_amx() { return nullptr; }
}  // namespace lm
#endif
