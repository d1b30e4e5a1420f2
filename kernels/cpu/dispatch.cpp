// The C interface: checks arguments, chooses the instruction set, lets one call run at a time.
#include <pthread.h>
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>
#include <mutex>
#include <string>

#include "work.h"

#ifndef LM_SOURCE_DIGEST
#define LM_SOURCE_DIGEST ""
#endif

namespace lm {

namespace {

bool runs_avx512() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool runs_avx512_vnni() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    return runs_avx512() && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

// Tiles are 8 KB of registers more, which the kernel must be asked for, once for all threads.
bool runs_amx() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
    unsigned int a, b, c, d;
    constexpr unsigned int bf16 = 1u << 22, tiles = 1u << 24;
    if (!runs_avx512_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tiles)) != (bf16 | tiles)) return false;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return !syscall(SYS_arch_prctl, request, tile_data);
#else
    return false;
#endif
}

bool runs_avx2() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    unsigned int a, b, c = 0, d;
    __get_cpuid(1, &a, &b, &c, &d);
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (c & bit_F16C);
#else
    return false;
#endif
}

std::vector<const Isa*> usable() {
    std::vector<const Isa*> found;
    const auto add = [&](bool runs, const Isa* (*isa)()) {
        if (runs && isa()) found.push_back(isa());
    };
    static const bool amx = runs_amx();  // the answer must not change
    add(amx, isa_amx);
    add(runs_avx512_vnni(), isa_avx512_vnni);
    add(runs_avx512(), isa_avx512);
    add(runs_avx2(), isa_avx2);
    add(true, isa_portable);
    return found;
}

const Isa*& chosen() {
    static const Isa* isa = usable().front();
    return isa;
}

std::mutex one_call;

// A child that is forked during another thread's call would find the lock taken for ever.
const int fork_handlers = pthread_atfork([] { one_call.lock(); }, [] { one_call.unlock(); }, [] { one_call.unlock(); });

// Never freed: a daemon thread may be inside a call when the process ends.
std::vector<ThreadMemory>& memory() {
    static auto& each = *new std::vector<ThreadMemory>;
    if ((int)each.size() < threads()) each = std::vector<ThreadMemory>(threads());
    return each;
}

// Runs a call alone and turns running out of memory into a status.
template <class Call>
int32_t guarded(Call call) {
    std::lock_guard<std::mutex> lock(one_call);
    try {
        return call();
    } catch (const std::bad_alloc&) {
        return LM_NO_MEMORY;
    }
}

}  // namespace

const Isa& isa() { return *chosen(); }

bool is_valid(const lm_matrix& m) {
    if (!m.data || m.rows < 1 || m.cols < 1 || m.cols > kMaxCols) return false;
    if (m.format < LM_F32 || m.format > LM_BOOK2) return false;
    if (m.format <= LM_BF16) return true;
    if (!m.scale || m.scale_type < LM_SCALE_F32 || m.scale_type > LM_SCALE_MARKS) return false;
    if (is_book(m.format) != (m.scale_type == LM_SCALE_MARKS) || (is_book(m.format) && m.group != 32)) return false;
    if (m.zero && m.format != LM_INT8 && m.format != LM_INT4) return false;
    if (m.format == LM_FP8) return true;
    return m.group > 0 && m.group % 32 == 0 && m.cols % m.group == 0;
}

}  // namespace lm

using namespace lm;

int32_t lm_abi(void) { return LM_ABI; }

const char* lm_source_digest(void) { return LM_SOURCE_DIGEST; }

const char* lm_isa(void) { return isa().name; }

const char* lm_isas(void) {
    static const std::string names = [] {
        std::string all;
        for (const Isa* isa : usable()) all += (all.empty() ? "" : " ") + std::string(isa->name);
        return all;
    }();
    return names.c_str();
}

int32_t lm_use_isa(const char* name) {
    return guarded([&] {
        for (const Isa* isa : usable())
            if (!std::strcmp(isa->name, name)) {
                chosen() = isa;
                return LM_OK;
            }
        return LM_BAD_ARGUMENT;
    });
}

int32_t lm_set_threads(int32_t count, const int32_t* cpus) {
    return guarded([&] { return set_threads(count, cpus) ? LM_OK : LM_BAD_ARGUMENT; });
}

int32_t lm_threads(void) {
    std::lock_guard<std::mutex> lock(one_call);
    return threads();
}

int32_t lm_linear(const lm_matrix* w, int64_t groups, const float* x, int64_t tokens, float* y, int32_t mode) {
    if (!w || !is_valid(*w) || groups < 1 || w->rows % groups || tokens < 0 || mode < LM_STRICT || mode > LM_FAST)
        return LM_BAD_ARGUMENT;
    if (!tokens) return LM_OK;
    return guarded([&] { return linear(*w, groups, x, tokens, y, mode, memory()); });
}

int32_t lm_decode(const lm_matrix* w, float* out) {
    if (!w || !is_valid(*w)) return LM_BAD_ARGUMENT;
    return guarded([&] { return decode(*w, out, memory()); });
}

int32_t lm_compare(const float* a, const float* b, int64_t rows, int64_t cols, double* sums) {
    if (rows < 1 || cols < 1) return LM_BAD_ARGUMENT;
    return guarded([&] { return compare(a, b, rows, cols, sums); });
}

int32_t lm_experts(const lm_matrix* table, int64_t num_experts, float limit, const float* x, int64_t tokens,
                   int64_t width, const int64_t* ids, const float* weights, int64_t top_k, float* y, int32_t mode) {
    if (!table || num_experts < 1 || tokens < 0 || top_k < 1 || mode < LM_STRICT || mode > LM_FAST)
        return LM_BAD_ARGUMENT;
    return guarded([&] {
        return experts(table, num_experts, limit, x, tokens, width, ids, weights, top_k, y, mode, memory());
    });
}

int32_t lm_hyper_enter(const lm_hyper* site, const float* streams, int64_t tokens, float* x, float* post, float* comb) {
    if (!site || site->streams < 1 || site->streams > LM_MAX_STREAMS || site->width < 1 || site->iterations < 1 ||
        site->streams * site->width > kMaxCols || tokens < 0)
        return LM_BAD_ARGUMENT;
    if (!tokens) return LM_OK;
    return guarded([&] { return hyper_enter(*site, streams, tokens, x, post, comb, memory()); });
}

int32_t lm_hyper_leave(int64_t num_streams, int64_t width, const float* streams, const float* y, const float* post,
                       const float* comb, int64_t tokens, float* out) {
    if (num_streams < 1 || num_streams > LM_MAX_STREAMS || width < 1 || tokens < 0) return LM_BAD_ARGUMENT;
    return guarded([&] { return hyper_leave(num_streams, width, streams, y, post, comb, tokens, out); });
}

int32_t lm_norm_rope(const float* x, const float* weight, float eps, const float* cos, const float* sin,
                     int64_t tokens, int64_t heads, int64_t width, int64_t pairs, float* y) {
    if (tokens < 0 || heads < 1 || width < 1 || pairs < 0 || 2 * pairs > width) return LM_BAD_ARGUMENT;
    return guarded([&] { return norm_rope(x, weight, eps, cos, sin, tokens, heads, width, pairs, y); });
}

int32_t lm_attend(const float* q, const float* window, int64_t window_rows, const float* entries, int64_t entry_rows,
                  const float* bias, const float* sink, int64_t heads, int64_t width, float scale, float* out) {
    if (window_rows < 0 || entry_rows < 0 || heads < 1 || width < 1 || width > kMaxCols) return LM_BAD_ARGUMENT;
    return guarded([&] {
        return attend(q, window, window_rows, entries, entry_rows, bias, sink, heads, width, scale, out, memory());
    });
}

int32_t lm_latent_attend(const float* q, const void* cache, int32_t format, int64_t rows, int64_t heads, int64_t width,
                         int64_t value_width, float scale, float* out) {
    if ((format != LM_F32 && format != LM_BF16) || rows < 1 || heads < 1 || width < 1 || width > kMaxCols ||
        value_width < 1 || value_width > width)
        return LM_BAD_ARGUMENT;
    return guarded([&] {
        return latent_attend(q, cache, format, rows, heads, width, value_width, scale, out, memory());
    });
}

int32_t lm_expanded_attend(const lm_expanded* block) {
    const lm_expanded& a = *block;
    // The last query sees a key of the block; else Python need not call.
    if (a.queries < 1 || a.keys < 1 || a.heads < 1 || a.nope < 0 || a.rope < 0 || a.nope + a.rope < 1 ||
        a.nope + a.rope > kMaxCols || a.value_width < 1 || a.keys > kMaxCols || a.first < 0 || a.at < 0 ||
        a.at >= a.first + a.queries)
        return LM_BAD_ARGUMENT;
    return guarded([&] { return expanded_attend(a, memory()); });
}

int32_t lm_latent_layers_step(const lm_latent_layer* const* layers, int64_t num_layers, float* x, int64_t tokens,
                              const float* cos, const float* sin, float* const* caches, const int64_t* lengths,
                              int32_t mode) {
    if (num_layers < 1 || tokens < 1 || mode < LM_STRICT || mode > LM_FAST) return LM_BAD_ARGUMENT;
    if (std::any_of(lengths, lengths + tokens, [](int64_t length) { return length < 1; })) return LM_BAD_ARGUMENT;
    for (int64_t i = 0; i < num_layers; i++)
        if (!is_valid(*layers[i]) || layers[i]->kv_a->cols != layers[0]->kv_a->cols || layers[i]->rope != layers[0]->rope)
            return LM_BAD_ARGUMENT;
    return guarded([&] {
        return latent_layers(layers, num_layers, x, tokens, cos, sin, caches, lengths, mode, memory());
    });
}

int32_t lm_moe_layer_step(const lm_moe_layer* layer, const float* x, int64_t tokens, int64_t* ids,
                          float* weights, float* y, int32_t mode) {
    if (!layer || !is_valid(*layer) || tokens < 1 || mode < LM_STRICT || mode > LM_FAST) return LM_BAD_ARGUMENT;
    return guarded([&] { return moe(*layer, x, tokens, ids, weights, y, mode, memory()); });
}

int32_t lm_round(const float* w, const float* importance, int64_t rows, int64_t cols, int32_t bits, int64_t group,
                 const float* shares, int32_t count, uint8_t* codes, uint16_t* scales) {
    if (rows < 1 || cols < 1 || cols > kMaxCols || (bits != 8 && bits != 4) || group < 32 || group % 32 ||
        cols % group || count < 1 || count > kMaxShares)
        return LM_BAD_ARGUMENT;
    return guarded([&] { return round(w, importance, rows, cols, bits, group, shares, count, codes, scales); });
}

int32_t lm_round_levels(const float* w, const float* importance, int64_t rows, int64_t cols, int64_t group,
                        const float* levels, int32_t num_levels, const float* candidates, int32_t count,
                        uint8_t* chosen, uint8_t* nearest) {
    if (rows < 1 || cols < 1 || cols > kMaxCols || group < 32 || group % 32 || cols % group || num_levels < 1 ||
        num_levels > 16 || count < 1)
        return LM_BAD_ARGUMENT;
    return guarded([&] {
        return round_levels(w, importance, rows, cols, group, levels, num_levels, candidates, count, chosen, nearest);
    });
}

int32_t lm_round_nf4(const float* w, const float* importance, int64_t rows, int64_t cols, const float* shares,
                     int32_t count, uint8_t* codes, float* scales) {
    if (rows < 1 || cols < 1 || cols > kMaxCols || cols % 64 || count < 1 || count > kMaxShares) return LM_BAD_ARGUMENT;
    return guarded([&] { return round_nf4(w, importance, rows, cols, shares, count, codes, scales); });
}

int32_t lm_round_nf4_fp4(const uint8_t* data, const uint8_t* exponents, const float* importance, int64_t rows,
                         int64_t cols, const float* shares, int32_t count, uint8_t* codes, float* scales) {
    if (rows < 1 || cols < 1 || cols > kMaxCols || cols % 64 || count < 1 || count > kMaxShares) return LM_BAD_ARGUMENT;
    return guarded([&] {
        return round_nf4_fp4(data, exponents, importance, rows, cols, shares, count, codes, scales, memory());
    });
}

int32_t lm_round_books(const float* w, const float* importance, int64_t rows, int64_t cols, int32_t bits,
                       uint8_t* codes, uint8_t* marks) {
    if (rows < 1 || cols < 1 || cols > kMaxCols || (bits != 3 && bits != 2) || cols % 32) return LM_BAD_ARGUMENT;
    return guarded([&] { return round_books(w, importance, rows, cols, bits, codes, marks, memory()); });
}

int32_t lm_round_books_fp4(const uint8_t* data, const uint8_t* exponents, const float* importance, int64_t rows,
                           int64_t cols, int32_t bits, uint8_t* codes, uint8_t* marks) {
    if (rows < 1 || cols < 1 || cols > kMaxCols || (bits != 3 && bits != 2) || cols % 32) return LM_BAD_ARGUMENT;
    return guarded([&] {
        return round_books_fp4(data, exponents, importance, rows, cols, bits, codes, marks, memory());
    });
}

int32_t lm_look_up(const uint8_t* pairs, int64_t nbytes, const uint8_t* table, uint8_t* out) {
    if (nbytes < 0) return LM_BAD_ARGUMENT;
    return guarded([&] { return look_up(pairs, nbytes, table, out); });
}

int64_t lm_zero_signs(const uint8_t* codes, int64_t nbytes, uint8_t* bits) { return zero_signs(codes, nbytes, bits); }

uint64_t lm_read(const void* data, int64_t nbytes) {
    static Phase phase;
    struct Read {
        const char* data;
        int64_t nbytes, piece_bytes;
        std::atomic<uint64_t> sum{0};
        void run(int thread) {
            phase.run(thread, [&](int64_t piece) {
                const int64_t first = piece * piece_bytes;
                sum += isa().read(data + first, std::min(piece_bytes, nbytes - first));
            });
        }
    };
    std::lock_guard<std::mutex> lock(one_call);
    // As rows_per_piece: all threads end together, also with a matrix of little more than 1 MiB.
    const int64_t even = (nbytes / (8 * threads()) + 4095) / 4096 * 4096;
    const int64_t piece_bytes = std::min<int64_t>(std::max<int64_t>(even, 4096), 1 << 20);
    phase.reset((nbytes + piece_bytes - 1) / piece_bytes, threads());
    Read work{static_cast<const char*>(data), nbytes, piece_bytes};
    run_on(threads(), work);
    return work.sum;
}
