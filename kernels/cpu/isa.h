// What is compiled once per instruction set, and chosen when the program runs.
#pragma once
#include <cstddef>
#include <cstdint>

#include "localmoe_cpu.h"

namespace lm {

// The layout of packed rows. Static: a shared copy compiled for one instruction set must not serve another.
static constexpr bool is_nibbles(int format) { return format == LM_FP4 || format == LM_INT4 || format == LM_NF4; }
static constexpr bool is_book(int format) { return format == LM_BOOK3 || format == LM_BOOK2; }
// Neighbouring inputs share bytes and come apart in another order; see decode.h.
static constexpr bool is_peeled(int format) { return is_nibbles(format) || is_book(format); }

// Inputs of a block, and its bytes.
static constexpr int64_t block_size(int format) { return is_peeled(format) ? 128 : 64; }
static constexpr int64_t block_bytes(int format) {
    return format == LM_F32 ? 256 : format == LM_BF16 ? 128 : format == LM_BOOK3 ? 48 : format == LM_BOOK2 ? 32 : 64;
}

static constexpr int64_t row_bytes(int format, int64_t cols) {
    return cols * block_bytes(format) / block_size(format);
}

// How activations and products are held: float32; bf16 with float32 sums; int8 with a scale for every 32 inputs; or
// float32 whose order of additions may depend on the number of tokens.
enum class Precision { f32, bf16, int8, loose_f32 };

// Working memory of one thread for Isa::rows.
struct Scratch {
    void* tile;      // decoded weights and, with AMX, laid out activations: kTileBytes
    float* scales;   // expanded scales and zero points (or numbers of tables) of two rows, kScaleEntries
};
constexpr size_t kTileBytes = size_t{1} << 20;
// Most columns a matrix may have; bounds Scratch.
constexpr int64_t kMaxCols = int64_t{1} << 18;
constexpr size_t kScaleEntries = 4 * (kMaxCols / 32 + 8);

// Inputs that may share a scale in lm_round.
constexpr int64_t kMaxGroup = 256;
// Scales that may be tried for a group of nf4.
constexpr int kMaxShares = 8;

struct Isa {
    const char* name;
    // What LM_FAST is for weights of a format and about so many tokens.
    Precision (*fast)(int format, int64_t tokens);
    // One token's activations [cols] into the lane order of `format`, zero-padded to whole blocks (at most 128 inputs).
    void (*pack)(int format, Precision, const float* x, int64_t cols, void* out);
    // out[t * stride + r - first] = w[r] . x[t] for rows [first, last) and `tokens` packed activations.
    void (*rows)(const lm_matrix& w, Precision, int64_t first, int64_t last, const void* const* x, int64_t tokens,
                 float* out, int64_t stride, const Scratch&);
    // Rows [first, last) of w in float32: out [last - first, cols].
    void (*decode)(const lm_matrix& w, int64_t first, int64_t last, float* out, const Scratch&);
    // sums[4]: of a * a, b * b, a * b and (a - b) squared.
    void (*compare)(const float* a, const float* b, int64_t n, double* sums);
    // hidden[i] = silu(min(gate[i], limit)) * clamp(up[i], -limit, limit)
    void (*swiglu)(const float* gate, const float* up, float limit, int64_t n, float* hidden);
    // y[i] += weight * x[i]
    void (*add_scaled)(float weight, const float* x, int64_t n, float* y);
    // y[h * y_stride + i] += sum over n of weights[h * stride + n] * x[n * x_stride + i], i < width
    void (*add_weighted)(const float* weights, int64_t stride, int64_t heads, const float* x, int64_t n,
                         int64_t x_stride, int64_t width, float* y, int64_t y_stride);
    // x[i] = exp(x[i] - largest) for x[i] <= largest, 0 where that is below 1e-37; returns their sum
    float (*exponentials)(float largest, int64_t n, float* x);
    // Scores to the weights of a softmax: *largest becomes the largest of itself and x[i] * scale, then x[i] becomes
    // 2 ** (x[i] * scale - *largest), 0 where that is below 2e-37; returns their sum. n a multiple of 16, scale > 0.
    // NaN is no largest, but makes the sum NaN.
    float (*weigh)(float scale, float* largest, int64_t n, float* x);
    // out[c * out_stride + r] = x[r * stride + c]
    void (*transpose)(const float* x, int64_t rows, int64_t cols, int64_t stride, float* out, int64_t out_stride);
    float (*sum_of_squares)(const float* x, int64_t n);
    // x[i] *= factor * weight[i]
    void (*scale_by)(float factor, const float* weight, int64_t n, float* x);
    uint64_t (*read)(const void* data, int64_t nbytes);
    // lm_look_up
    void (*look_up)(const uint8_t* pairs, int64_t nbytes, const uint8_t* table, uint8_t* out);
    // One group of lm_round, n <= kMaxGroup inputs: its scale as bf16, and its codes of `bits` bits.
    uint16_t (*round_group)(const float* w, const float* importance, int64_t n, int bits, const float* shares,
                            int count, uint8_t* codes);
    // One group of lm_round_levels: the number of its scale among candidates[i * step], and of each input's level.
    int (*round_levels)(const float* w, const float* importance, int64_t n, const float* levels, int num_levels,
                        const float* candidates, int64_t step, int count, uint8_t* nearest);
    // One group of 32 of lm_round_books: its mark, and which level each input gets.
    uint8_t (*round_book)(int format, const float* w, const float* importance, float row, uint8_t* levels);
    // The same for the groups of a row of FP4 with e8m0 scales, whose largest magnitude is `largest`.
    void (*round_book_fp4)(int format, const uint8_t* data, const uint8_t* exponents, const float* importance,
                           int64_t cols, float largest, uint8_t* levels, uint8_t* marks, const Scratch&);
    // One group of lm_round_nf4: its scale, and 32 bytes of codes; count <= kMaxShares.
    float (*round_nf4)(const float* w, const float* importance, const float* shares, int count, uint8_t* codes);
    // The same for all groups of rows of FP4 with e8m0 scales.
    void (*round_nf4_fp4)(const uint8_t* data, const uint8_t* exponents, const float* importance, int64_t rows,
                          int64_t cols, const float* shares, int count, uint8_t* codes, float* scales, const Scratch&);
};

// Null where this build lacks the instructions; not to be called where the machine does.
const Isa* isa_amx();
const Isa* isa_avx512_vnni();
const Isa* isa_avx512();
const Isa* isa_avx2();
const Isa* isa_portable();

}  // namespace lm
