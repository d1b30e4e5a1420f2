// Matrices to integers and codebooks, with a searched scale for each group.
#include <cmath>
#include <cstring>

#include "pack.h"
#include "work.h"

namespace lm {
namespace {

// Rows of a piece: a tenth of a millisecond of work.
constexpr int64_t kRows = 4;

struct Round {
    const float *w, *importance;
    const int64_t rows, cols;
    const int bits;
    const int64_t group;
    const float* shares;
    const int count;
    uint8_t* codes;
    uint16_t* scales;
    Phase& phase;

    void run(int thread) {
        phase.run(thread, [&](int64_t piece) {
            for (int64_t r = piece * kRows; r < std::min((piece + 1) * kRows, rows); r++) one(r);
        });
    }

    void one(int64_t r) {
        for (int64_t at = r * cols; at < (r + 1) * cols; at += group)
            scales[at / group] = isa().round_group(w + at, importance + at - r * cols, group, bits, shares, count,
                                                   codes + at * bits / 8);
    }
};

// Of the two FP4 codes of a byte, how many are zeros, and their signs.
struct Zeros {
    uint8_t count[256] = {}, signs[256] = {};
    constexpr Zeros() {
        for (int byte = 0; byte < 256; byte++)
            for (int shift = 0; shift < 8; shift += 4) {
                if (byte >> shift & 7) continue;
                count[byte]++;
                signs[byte] = (uint8_t)(signs[byte] << 1 | (byte >> (shift + 3) & 1));
            }
    }
};
constexpr Zeros kZeros;

int book_of(int bits) { return bits == 3 ? LM_BOOK3 : LM_BOOK2; }

// Rows of a piece of round_pieces: with FP4, each piece works its tables out anew.
constexpr int64_t kRowsOfPiece = 32;

// Calls some(first row, last row, memory of the thread or null) for all rows.
template <class Some>
int32_t round_pieces(int64_t rows, int threads, const Some& some, ThreadMemory* memory) {
    static Phase phase;
    struct Work {
        const int64_t rows;
        const Some& some;
        ThreadMemory* memory;
        Phase& phase;

        void run(int thread) {
            Scratch scratch;
            if (memory) scratch = memory[thread].scratch();
            phase.run(thread, [&](int64_t piece) {
                const int64_t first = piece * kRowsOfPiece;
                some(first, std::min(first + kRowsOfPiece, rows), memory ? &scratch : nullptr);
            });
        }
    } work{rows, some, memory, phase};
    phase.reset((rows + kRowsOfPiece - 1) / kRowsOfPiece, threads);
    run_on(threads, work);
    return LM_OK;
}

// Rounds row after row to codebooks. of_row: (row, its largest magnitude or 1, its levels, its marks, memory).
template <class Largest, class Row>
int32_t round_rows(int64_t rows, int64_t cols, int bits, uint8_t* codes, uint8_t* marks, Largest largest_of, Row of_row,
                   std::vector<ThreadMemory>& memory) {
    static Phase phase;
    struct Work {
        const int64_t cols;
        const int bits;
        uint8_t *codes, *marks;
        Largest& largest_of;
        Row& of_row;
        ThreadMemory* memory;
        Phase& phase;

        void run(int thread) {
            uint8_t* levels = memory[thread].outputs[0].get<uint8_t>(cols);
            const Scratch scratch = memory[thread].scratch();
            phase.run(thread, [&](int64_t r) {
                float largest = largest_of(r);
                if (!(largest > 0)) largest = 1;
                uint8_t* mark = marks + r * (cols / 32 + 4);
                std::memcpy(mark, &largest, 4);
                of_row(r, largest, levels, mark + 4, scratch);
                pack_codes(levels, cols, bits, codes + r * cols * bits / 8);
            });
        }
    } work{cols, bits, codes, marks, largest_of, of_row, memory.data(), phase};
    const int threads = width_for(rows * cols * (int64_t)sizeof(float), 800);
    prepare(memory, threads, cols);
    phase.reset(rows, threads);
    run_on(threads, work);
    return LM_OK;
}

}  // namespace

int32_t round(const float* w, const float* importance, int64_t rows, int64_t cols, int bits, int64_t group,
              const float* shares, int count, uint8_t* codes, uint16_t* scales) {
    static Phase phase;
    if (group > kMaxGroup) return LM_BAD_ARGUMENT;
    const int threads = width_for(rows * cols * (int64_t)sizeof(float), 8 * count);
    phase.reset((rows + kRows - 1) / kRows, threads);
    Round work{w, importance, rows, cols, bits, group, shares, count, codes, scales, phase};
    run_on(threads, work);
    return LM_OK;
}

int32_t round_nf4(const float* w, const float* importance, int64_t rows, int64_t cols, const float* shares, int count,
                  uint8_t* codes, float* scales) {
    const auto some = [&](int64_t first, int64_t last, const Scratch*) {
        for (int64_t at = first * cols; at < last * cols; at += 64)
            scales[at / 64] = isa().round_nf4(w + at, importance + at % cols, shares, count, codes + at / 2);
    };
    return round_pieces(rows, width_for(rows * cols * (int64_t)sizeof(float), 8 * count), some, nullptr);
}

int32_t round_nf4_fp4(const uint8_t* data, const uint8_t* exponents, const float* importance, int64_t rows,
                      int64_t cols, const float* shares, int count, uint8_t* codes, float* scales,
                      std::vector<ThreadMemory>& memory) {
    const auto some = [&](int64_t first, int64_t last, const Scratch* scratch) {
        isa().round_nf4_fp4(data + first * cols / 2, exponents + first * cols / 32, importance, last - first, cols,
                            shares, count, codes + first * cols / 2, scales + first * cols / 64, *scratch);
    };
    const int threads = width_for(rows * cols * (int64_t)sizeof(float), count);
    prepare(memory, threads, cols);
    return round_pieces(rows, threads, some, memory.data());
}

int32_t round_levels(const float* w, const float* importance, int64_t rows, int64_t cols, int64_t group,
                     const float* levels, int num_levels, const float* candidates, int count, uint8_t* chosen,
                     uint8_t* nearest) {
    static Phase phase;
    const int threads = width_for(rows * cols * (int64_t)sizeof(float), 8 * count);
    const int64_t per_row = cols / group;
    const auto one = [&](int64_t r) {
        for (int64_t g = 0; g < per_row; g++) {
            const int64_t at = r * cols + g * group, i = r * per_row + g;
            chosen[i] = (uint8_t)isa().round_levels(w + at, importance + g * group, group, levels, num_levels,
                                                    candidates + i, rows * per_row, count, nearest + at);
        }
    };
    struct Work {
        const decltype(one)& row;
        void run(int thread) { phase.run(thread, row); }
    } work{one};
    phase.reset(rows, threads);
    run_on(threads, work);
    return LM_OK;
}

int32_t round_books(const float* w, const float* importance, int64_t rows, int64_t cols, int bits, uint8_t* codes,
                    uint8_t* marks, std::vector<ThreadMemory>& memory) {
    const auto largest = [&](int64_t r) {
        float found = 0;
        for (int64_t c = 0; c < cols; c++) found = std::max(found, std::fabs(w[r * cols + c]));
        return found;
    };
    const auto round = [&](int64_t r, float row, uint8_t* levels, uint8_t* mark, const Scratch&) {
        for (int64_t c = 0; c < cols; c += 32)
            mark[c / 32] = isa().round_book(book_of(bits), w + r * cols + c, importance + c, row, levels + c);
    };
    return round_rows(rows, cols, bits, codes, marks, largest, round, memory);
}

int32_t round_books_fp4(const uint8_t* data, const uint8_t* exponents, const float* importance, int64_t rows,
                        int64_t cols, int bits, uint8_t* codes, uint8_t* marks, std::vector<ThreadMemory>& memory) {
    const float magnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    const auto largest = [&](int64_t r) {
        float found = 0;
        for (int64_t g = 0; g < cols / 32; g++) {
            uint8_t most = 0;
            for (int i = 0; i < 16; i++) {
                const uint8_t both = data[r * cols / 2 + 16 * g + i];
                most = std::max<uint8_t>(most, std::max<uint8_t>(both & 7, both >> 4 & 7));
            }
            found = std::max(found, std::ldexp(magnitudes[most], exponents[r * (cols / 32) + g] - 127));
        }
        return found;
    };
    const auto round = [&](int64_t r, float row, uint8_t* levels, uint8_t* mark, const Scratch& scratch) {
        isa().round_book_fp4(book_of(bits), data + r * cols / 2, exponents + r * (cols / 32), importance, cols, row,
                             levels, mark, scratch);
    };
    return round_rows(rows, cols, bits, codes, marks, largest, round, memory);
}

int32_t look_up(const uint8_t* pairs, int64_t nbytes, const uint8_t* table, uint8_t* out) {
    constexpr int64_t kBytes = 1 << 14;
    const auto some = [&](int64_t first, int64_t last, const Scratch*) {
        const int64_t begin = first * kBytes, end = std::min(last * kBytes, nbytes);
        isa().look_up(pairs + begin, end - begin, table, out + 2 * begin);
    };
    return round_pieces((nbytes + kBytes - 1) / kBytes, width_for(nbytes, 1), some, nullptr);
}

int64_t zero_signs(const uint8_t* codes, int64_t nbytes, uint8_t* bits) {
    int64_t count = 0;
    uint64_t pending = 0;
    int held = 0;
    for (int64_t i = 0; i < nbytes; i++) {
        pending = pending << kZeros.count[codes[i]] | kZeros.signs[codes[i]];
        held += kZeros.count[codes[i]];
        if (held >= 8) {
            held -= 8;
            *bits++ = (uint8_t)(pending >> held);
            count += 8;
        }
    }
    if (held) *bits = (uint8_t)(pending << (8 - held));
    return count + held;
}

}  // namespace lm
