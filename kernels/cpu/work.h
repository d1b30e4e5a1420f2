// What every call needs: the chosen instruction set, memory that is kept between calls, and how rows are cut.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace lm {

const Isa& isa();

// Memory that only grows, aligned to cache lines; what it holds is lost when it grows.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }

    template <class T>
    T* get(size_t count) {
        const size_t need = count * sizeof(T);
        if (need > size_) {
            const size_t room = std::max(need, size_ + size_ / 2);  // attention's scores grow with every token
            ::operator delete(data_, std::align_val_t{64});
            data_ = nullptr;
            size_ = 0;
            data_ = ::operator new(room, std::align_val_t{64});
            size_ = room;
        }
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// One thread's memory: Isa::rows' own, and rows of outputs.
struct ThreadMemory {
    Buffer tile, scales, outputs[2];
    Scratch scratch() { return {tile.get<char>(kTileBytes), scales.get<float>(kScaleEntries)}; }
};

// Allocates what a job on `width` threads will ask for: inside a job, running out of memory could not be told.
inline void prepare(std::vector<ThreadMemory>& memory, int width, size_t output_bytes) {
    for (int i = 0; i < width; i++) {
        memory[i].scratch();
        for (Buffer& output : memory[i].outputs) output.get<char>(output_bytes);
    }
}

// Activations of several tokens in the lane order of a format.
struct Packed {
    char* data;
    size_t bytes;  // of one token
    const void* token(int64_t t) const { return data + t * bytes; }
};

inline Packed packed(Buffer& buffer, int64_t tokens, int64_t cols, Precision precision) {
    // One cache line more than needed, so that tokens do not share cache sets.
    const size_t inputs = (cols + 127) / 128 * 128;
    const size_t bytes = precision == Precision::bf16   ? 2 * inputs
                         : precision == Precision::int8 ? inputs + inputs / 32 * 2 * sizeof(float)
                                                        : 4 * inputs;
    const size_t size = (bytes + 63) / 64 * 64 + 64;
    return {buffer.get<char>(size * tokens), size};
}

inline int64_t row_bytes(const lm_matrix& m) { return row_bytes(m.format, m.cols); }

// How many threads a call is worth: waking one costs as much as reading some 100 KB.
inline int width_for(int64_t bytes, int64_t tokens) {
    const int64_t work = bytes * ((tokens + 7) / 8) / (128 << 10);
    return static_cast<int>(std::min<int64_t>(std::max<int64_t>(work, 1), threads()));
}

// Rows of a piece: about 1 MiB of weights, so that the start of a stream is a small part of it, but enough pieces for
// all threads to end together. A multiple of 32, the rows of a tile.
//
// Few threads that read for few tokens are rarely far apart, and longer streams save more than they cost: 2 cores of
// a Zen 5 decode V2-Lite 3 % and V4-Flash 1 % faster.
inline int64_t rows_per_piece(const lm_matrix& m, int64_t matrices, int width, int64_t tokens) {
    const bool few = width <= 4 && tokens <= 8;
    int64_t rows = std::max<int64_t>((few ? 4 << 20 : 1 << 20) / std::max<int64_t>(row_bytes(m), 1), 1);
    rows = std::min(rows, m.rows * matrices / ((few ? 2 : 8) * width));
    return std::max<int64_t>(rows / 32 * 32, 32);
}

// tokens: that a matrix meets, about.
inline Precision precision(int32_t mode, int format, int64_t tokens) {
    return mode == LM_FAST ? isa().fast(format, tokens) : Precision::f32;
}

// Whether format, group and scales fit together and nothing is out of range.
bool is_valid(const lm_matrix& m);
// Whether the parts of a layer are valid and of shapes that fit together.
bool is_valid(const lm_latent_layer& layer);
bool is_valid(const lm_moe_layer& layer);

int32_t linear(const lm_matrix& w, int64_t groups, const float* x, int64_t tokens, float* y, int32_t mode,
               std::vector<ThreadMemory>& memory);
int32_t decode(const lm_matrix& w, float* out, std::vector<ThreadMemory>& memory);
int32_t compare(const float* a, const float* b, int64_t rows, int64_t cols, double* sums);
int32_t experts(const lm_matrix* table, int64_t num_experts, float limit, const float* x, int64_t tokens,
                int64_t input_width, const int64_t* ids, const float* weights, int64_t top_k, float* y, int32_t mode,
                std::vector<ThreadMemory>& memory);

int32_t hyper_enter(const lm_hyper& site, const float* streams, int64_t tokens, float* x, float* post, float* comb,
                    std::vector<ThreadMemory>& memory);
int32_t hyper_leave(int64_t num_streams, int64_t width, const float* streams, const float* y, const float* post,
                    const float* comb, int64_t tokens, float* out);

int32_t norm_rope(const float* x, const float* weight, float eps, const float* cos, const float* sin, int64_t tokens,
                  int64_t heads, int64_t width, int64_t pairs, float* y);

int32_t attend(const float* q, const float* window, int64_t window_rows, const float* entries, int64_t entry_rows,
               const float* bias, const float* sink, int64_t heads, int64_t width, float scale, float* out,
               std::vector<ThreadMemory>& memory);

int32_t latent_attend(const float* q, const void* cache, int32_t format, int64_t rows, int64_t heads, int64_t width,
                      int64_t value_width, float scale, float* out, std::vector<ThreadMemory>& memory);

int32_t expanded_attend(const lm_expanded& a, std::vector<ThreadMemory>& memory);

int32_t latent_layers(const lm_latent_layer* const* layers, int64_t num_layers, float* x, int64_t tokens,
                      const float* cos, const float* sin, float* const* caches, const int64_t* lengths, int32_t mode,
                      std::vector<ThreadMemory>& memory);
int32_t moe(const lm_moe_layer& layer, const float* x, int64_t tokens, int64_t* ids, float* weights, float* y,
            int32_t mode, std::vector<ThreadMemory>& memory);

int32_t round(const float* w, const float* importance, int64_t rows, int64_t cols, int bits, int64_t group,
              const float* shares, int count, uint8_t* codes, uint16_t* scales);
int32_t round_levels(const float* w, const float* importance, int64_t rows, int64_t cols, int64_t group,
                     const float* levels, int num_levels, const float* candidates, int count, uint8_t* chosen,
                     uint8_t* nearest);
int32_t round_nf4(const float* w, const float* importance, int64_t rows, int64_t cols, const float* shares, int count,
                  uint8_t* codes, float* scales);
int32_t round_nf4_fp4(const uint8_t* data, const uint8_t* exponents, const float* importance, int64_t rows,
                      int64_t cols, const float* shares, int count, uint8_t* codes, float* scales,
                      std::vector<ThreadMemory>& memory);
int32_t round_books_fp4(const uint8_t* data, const uint8_t* exponents, const float* importance, int64_t rows,
                        int64_t cols, int bits, uint8_t* codes, uint8_t* marks, std::vector<ThreadMemory>& memory);
int32_t look_up(const uint8_t* pairs, int64_t nbytes, const uint8_t* table, uint8_t* out);
int64_t zero_signs(const uint8_t* codes, int64_t nbytes, uint8_t* bits);
int32_t round_books(const float* w, const float* importance, int64_t rows, int64_t cols, int bits, uint8_t* codes,
                    uint8_t* marks, std::vector<ThreadMemory>& memory);

// Calls work.run(thread) on up to `width` threads.
template <class T>
void run_on(int width, T& work) {
    run([](void* context, int thread) { static_cast<T*>(context)->run(thread); }, &work, width);
}

}  // namespace lm
