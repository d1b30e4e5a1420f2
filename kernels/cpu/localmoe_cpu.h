// C interface of the CPU kernels: dequantizing matrix products for decode and prefill.
//
// Weights are read in the layout in which checkpoints publish them; nothing is repacked or copied. Everything is
// row-major. Functions return LM_OK or an error and never throw. Calls from several threads are run one by one.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LM_API __attribute__((visibility("default")))

// Raised whenever a signature or struct below changes: native.py refuses a library of another number.
#define LM_ABI 13

enum lm_format {
    LM_F32 = 0,
    LM_BF16 = 1,
    LM_FP8 = 2,   // e4m3fn, one scale per 128 x 128 block
    LM_FP4 = 3,   // e2m1, two per byte, low nibble first, one scale per `group` inputs of a row
    LM_INT8 = 4,  // unsigned byte - zero point (128 where there is no zero tensor), scale per `group`
    LM_INT4 = 5,  // unsigned nibble - zero point (8 where there is no zero tensor), low nibble first
    LM_NF4 = 6,   // one of sixteen quantiles of a normal distribution, HIGH nibble first, scale per `group`
    LM_BOOK3 = 7,  // 3 bits that choose a level of the group's codebook, from the lowest bit on; groups of 32
    LM_BOOK2 = 8,  // the same with 2 bits
};

enum lm_scale {
    LM_SCALE_NONE = 0,
    LM_SCALE_F32 = 1,
    LM_SCALE_BF16 = 2,
    LM_SCALE_F16 = 3,
    LM_SCALE_E8M0 = 4,  // byte b is 2 ** (b - 127); 255 must not occur, and 0 may be taken for zero
    // Of codebooks: for each row a float32, then a byte per group, which has the number of its table in the lower five
    // bits and in the upper three how often its scale is halved twice over: row * 2 ** (-upper / 2).
    LM_SCALE_MARKS = 5,
};

enum lm_status { LM_OK = 0, LM_BAD_ARGUMENT = 1, LM_NO_MEMORY = 2 };

// A [rows, cols] weight. zero: one byte per scale, or null. group: a multiple of 32; FP8 always has blocks of 128.
typedef struct lm_matrix {
    const void* data;
    const void* scale;
    const void* zero;
    int64_t rows;
    int64_t cols;
    int32_t format;
    int32_t scale_type;
    int32_t group;
    int32_t reserved;  // padding
} lm_matrix;

// Arithmetic. STRICT: float32 throughout, one order of additions whatever the number of tokens or threads.
// FAST with AVX2, or AVX-512 and VNNI: for INT4, FP4 and INT8, activations are rounded to int8 with a float32 scale for
// every 32 of them (fake_quant_int8 in reference.py); others are as without VNNI, or, with AVX2, differ from STRICT in
// the order of additions only. AMX: the same for up to eight tokens (of experts: on average over all of the table, of
// all ids of the call), then all formats are as in the next paragraph.
// FAST otherwise, where the CPU multiplies BF16: activations are rounded to bf16, sums are float32. Weights are rounded to bf16
// too where they are not exact in it once scaled: F32, INT8, NF4, integers with zero points, and for more than four
// tokens INT4, codebooks, and FP8 whose scales are no powers of two.
// Elsewhere FAST is STRICT.
enum lm_mode { LM_STRICT = 0, LM_FAST = 1 };

LM_API int32_t lm_abi(void);

// Digest of the sources this library was built from, as hexadecimal text.
LM_API const char* lm_source_digest(void);

// Name of the instruction set in use: "amx", "avx512-vnni", "avx512-bf16", "avx2" or "portable".
LM_API const char* lm_isa(void);

// Names of all instruction sets this machine can run, best first, separated by spaces; lm_use_isa takes one of them.
LM_API const char* lm_isas(void);
LM_API int32_t lm_use_isa(const char* name);

// Threads that share every call, the caller included. cpus: a processor for each thread but the first, or null to let
// them float.
LM_API int32_t lm_set_threads(int32_t count, const int32_t* cpus);
LM_API int32_t lm_threads(void);

// y[t, r] = sum over c of w[r, c] * x[t, g, c], where the rows of w are cut into `groups` equal parts and row r is in
// part g. x: [tokens, groups, cols] float32; y: [tokens, rows] float32.
LM_API int32_t lm_linear(const lm_matrix* w, int64_t groups, const float* x, int64_t tokens, float* y, int32_t mode);

// out [rows, cols] float32: the numbers that a matrix stands for, rounded once.
LM_API int32_t lm_decode(const lm_matrix* w, float* out);

// sums [rows, 4] float64: of each row of a, b [rows, cols] float32 the sums of a * a, b * b, a * b and (a - b) squared.
// The same bits with every instruction set and number of threads.
LM_API int32_t lm_compare(const float* a, const float* b, int64_t rows, int64_t cols, double* sums);

// One MoE layer: y[t] += sum over k of weights[t, k] * E_ids[t, k](x[t]), terms added in order of expert id, with
// E(x) = w2 @ (silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit)). Calls for ascending ranges of ids add up to the
// same bits as one call for all.
// experts: [num_experts][3] as w1, w2, w3; those chosen must be of one shape and format. A null data pointer marks an
// expert that must not be chosen. x, y: [tokens, width] float32; ids, weights (float32): [tokens, top_k]; pairs with
// the id -1 are left out.
LM_API int32_t lm_experts(const lm_matrix* experts, int64_t num_experts, float limit, const float* x, int64_t tokens,
                          int64_t width, const int64_t* ids, const float* weights, int64_t top_k, float* y,
                          int32_t mode);

// A site of a manifold-constrained hyper-connection (DeepSeek-V4 report, section 2.2). All float32: fn
// [(2 + streams) * streams, streams * width], base [(2 + streams) * streams], scale [3], norm [width].
enum { LM_MAX_STREAMS = 16 };
typedef struct lm_hyper {
    const float* fn;
    const float* base;
    const float* scale;
    const float* norm;
    int64_t streams;
    int64_t width;
    int32_t iterations;
    float norm_eps;
    float eps;
    int32_t reserved;  // padding
} lm_hyper;

// streams [tokens, streams, width] -> x [tokens, width], the normed input of the sublayer, and what hyper_leave needs:
// post [tokens, streams], comb [tokens, streams, streams].
LM_API int32_t lm_hyper_enter(const lm_hyper* site, const float* streams, int64_t tokens, float* x, float* post,
                              float* comb);

// out[t, k] = post[t, k] * y[t] + sum over j of comb[t, j, k] * streams[t, j]; out must not be streams.
LM_API int32_t lm_hyper_leave(int64_t num_streams, int64_t width, const float* streams, const float* y,
                              const float* post, const float* comb, int64_t tokens, float* out);

// Each row of x [tokens, heads, width] divided by its root mean square (sqrt(mean + eps)) and times weight [width],
// both left out where eps is negative, the second also where weight is null; then its last 2 * pairs elements turned
// as interleaved pairs by cos, sin [tokens, pairs], null where pairs is 0. All float32; y must not be x.
LM_API int32_t lm_norm_rope(const float* x, const float* weight, float eps, const float* cos, const float* sin,
                            int64_t tokens, int64_t heads, int64_t width, int64_t pairs, float* y);

// Attention of one query over keys that are their own values, with a sink per head that only joins the denominator:
// out[h] = sum over n of softmax(scale * q[h] . key[n] + bias[n], sink[h]) * key[n], keys being the rows of window,
// then of entries. q, out: [heads, width]; window [window_rows, width]; entries [entry_rows, width];
// bias [entry_rows] or null, -inf hides an entry; sink [heads]. All float32.
LM_API int32_t lm_attend(const float* q, const float* window, int64_t window_rows, const float* entries,
                         int64_t entry_rows, const float* bias, const float* sink, int64_t heads, int64_t width,
                         float scale, float* out);

// Attention of one query of multi-head latent attention, all heads over the same rows, which are the keys and, with
// their first `value_width` elements, the values: out[h] = sum over n of softmax(scale * q[h] . cache[n]) * cache[n].
// q [heads, width] and out [heads, value_width] are float32, cache [rows, width] is in the format LM_F32 or LM_BF16. The
// same bits whatever the number of threads.
LM_API int32_t lm_latent_attend(const float* q, const void* cache, int32_t format, int64_t rows, int64_t heads,
                                int64_t width, int64_t value_width, float scale, float* out);

// Many queries of multi-head latent attention over one block of keys and values, of which each head has its own: the
// first `nope` elements of a key and the value are in expanded, the last `rope` elements, of all heads, in rotated.
// Query i is at position first + i, key j at position `at` + j, and each query sees keys up to its own position. Blocks
// are given in the order of their positions, from 0 to the last query's; the state is of the same tensors then, and is
// neither set before nor read after. As bf16 where the CPU multiplies that, else float32; sums are float32.
typedef struct lm_expanded {
    const float* q;         // [queries, heads, nope + rope]
    const float* expanded;  // [keys, heads, nope + value_width]
    const float* rotated;   // [keys, rope], rotated_stride elements apart
    float* top;             // [heads, queries], state
    float* total;           // [heads, queries], state
    float* sums;            // [heads, value_width, queries], state
    float* out;             // [queries, heads, value_width], written for queries that have seen all of their keys
    int64_t queries;
    int64_t keys;
    int64_t heads;
    int64_t nope;
    int64_t rope;
    int64_t value_width;
    int64_t rotated_stride;
    int64_t first;
    int64_t at;
    float scale;
    int32_t reserved;  // padding
} lm_expanded;

LM_API int32_t lm_expanded_attend(const lm_expanded* block);

enum lm_scoring { LM_SOFTMAX = 0, LM_SIGMOID = 1 };

// The feed-forward half of a layer. experts [num_experts][3], gate [num_experts, width] and bias [num_experts] float32
// (or null) are the routed experts and their router, experts and gate null where there are none; shared [3] or null.
// norm: float32 [width].
typedef struct lm_moe_layer {
    const lm_matrix* experts;
    const lm_matrix* gate;
    const lm_matrix* shared;
    const float* bias;
    const float* norm;
    int64_t num_experts;
    int64_t width;
    int64_t top_k;
    int32_t scoring;
    int32_t groups;  // of which the `keep` are taken whose `best` largest experts have the largest sum
    int32_t keep;
    int32_t best;
    int32_t normalize;
    int32_t gate_mode;  // the arithmetic of the router
    float scale;
    float limit;
    float eps;         // of norm
    int32_t reserved;  // padding
} lm_moe_layer;

// y = x + mlp(norm(x)); x and y [tokens, width]. ids, weights [tokens, top_k]: the experts with the largest score + bias,
// of equal ones the first, and with what weights they were taken.
LM_API int32_t lm_moe_layer_step(const lm_moe_layer* layer, const float* x, int64_t tokens, int64_t* ids,
                                 float* weights, float* y, int32_t mode);

// A layer of multi-head latent attention (DeepSeek-V2). feed has a norm; null ends the layer after attention. Norms are
// float32: norm [width], q_norm [rows of q_a], kv_norm [rank]. Matrices: q_a (or null) [_, width], q_b
// [heads * (nope + rope), _], kv_a [rank + rope, width], keys [heads * rank, nope], values [_, rank] and out
// [width, rows of values].
typedef struct lm_latent_layer {
    const lm_matrix* q_a;
    const lm_matrix* q_b;
    const lm_matrix* kv_a;
    const lm_matrix* keys;
    const lm_matrix* values;
    const lm_matrix* out;
    const float* norm;
    const float* q_norm;
    const float* kv_norm;
    const lm_moe_layer* feed;
    int64_t heads;
    int64_t rank;
    int64_t nope;
    int64_t rope;
    float eps;         // of norm
    float latent_eps;  // of q_norm and kv_norm
    float scale;
    int32_t reserved;  // padding
} lm_latent_layer;

// x [tokens, width] goes through layers in turn, each x += attention(norm(x)), then x += mlp(norm(x)). Each token extends
// a sequence of its own and sees all of it: caches [num_layers][tokens] have room for lengths[t] rows [rank + rope]
// float32, of which the last is written by this call. cos, sin [tokens, rope / 2]. Attention has the same bits as
// lm_norm_rope, lm_linear and lm_latent_attend one after the other.
LM_API int32_t lm_latent_layers_step(const lm_latent_layer* const* layers, int64_t num_layers, float* x, int64_t tokens,
                                     const float* cos, const float* sin, float* const* caches, const int64_t* lengths,
                                     int32_t mode);

// Rounds w [rows, cols] float32, finite, to integers of `bits` 8 or 4 with a bf16 scale per `group` inputs (a multiple of
// 32). Of the scales shares[i], at most 8, * (largest magnitude of the group) / (2 ** (bits - 1) - 1), rounded to bf16, the first
// with the least sum of importance[c] * squared error is taken; importance [cols], not negative. codes: as LM_INT8 or
// LM_INT4 without zero points; scales: [rows, cols / group]. The same bits with every instruction set and number of
// threads.
LM_API int32_t lm_round(const float* w, const float* importance, int64_t rows, int64_t cols, int32_t bits, int64_t group,
                        const float* shares, int32_t count, uint8_t* codes, uint16_t* scales);

// The same to `num_levels` levels, at most 16, times a scale per `group` inputs: of candidates [count][rows, cols / group]
// the first with the least error, whose number is put into chosen [rows, cols / group]. nearest [rows, cols]: the
// number of each input's level, the first of two that are equally near.
LM_API int32_t lm_round_levels(const float* w, const float* importance, int64_t rows, int64_t cols, int64_t group,
                               const float* levels, int32_t num_levels, const float* candidates, int32_t count,
                               uint8_t* chosen, uint8_t* nearest);

// The same to nf4 with a float32 scale per 64 inputs: shares[i], at most 8, times the group's largest magnitude, or times
// 1 if that is 0. codes: as LM_NF4; scales: [rows, cols / 64].
LM_API int32_t lm_round_nf4(const float* w, const float* importance, int64_t rows, int64_t cols, const float* shares,
                            int32_t count, uint8_t* codes, float* scales);

// As lm_round_nf4, of an FP4 matrix as it is published: data [rows, cols / 2], exponents [rows, cols / 32] not 255.
LM_API int32_t lm_round_nf4_fp4(const uint8_t* data, const uint8_t* exponents, const float* importance, int64_t rows,
                                int64_t cols, const float* shares, int32_t count, uint8_t* codes, float* scales);

// The same to codebooks of `bits` 3 or 2. codes [rows, cols * bits / 8], marks [rows, 4 + cols / 32] as LM_SCALE_MARKS;
// a row's float32 is its largest magnitude.
LM_API int32_t lm_round_books(const float* w, const float* importance, int64_t rows, int64_t cols, int32_t bits,
                              uint8_t* codes, uint8_t* marks);

// As lm_round_books, of an FP4 matrix as it is published: data [rows, cols / 2], exponents [rows, cols / 32] not 255.
LM_API int32_t lm_round_books_fp4(const uint8_t* data, const uint8_t* exponents, const float* importance, int64_t rows,
                                  int64_t cols, int32_t bits, uint8_t* codes, uint8_t* marks);

// out [2 * nbytes]: what a table of sixteen bytes says of codes of four bits, the lower of a byte first.
LM_API int32_t lm_look_up(const uint8_t* pairs, int64_t nbytes, const uint8_t* table, uint8_t* out);

// Of all zeros among FP4 codes, the lower of a byte first: whether their sign is set, a bit each, the highest of a byte
// first. bits [nbytes / 4 + 1]; returns how many zeros there are.
LM_API int64_t lm_zero_signs(const uint8_t* codes, int64_t nbytes, uint8_t* bits);

// Reads every byte with all threads and returns a checksum: the memory ceiling the kernels are measured against.
LM_API uint64_t lm_read(const void* data, int64_t nbytes);

#ifdef __cplusplus
}
#endif
