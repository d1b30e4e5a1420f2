// Persistent threads that run one job together, the caller being thread 0.
//
// Between jobs they spin for a moment, because the next one usually follows within microseconds, then sleep.
#pragma once
#include <atomic>
#include <cstdint>

namespace lm {

// A part of a job that must be complete before the next begins: numbered pieces [0, total), cut into one run of
// neighbours per thread, so that each reads memory in order; who finishes early helps the others.
//
// What is waited for is pieces, not threads: one that the system keeps from running takes no piece and delays nobody.
class Phase {
  public:
    static constexpr int kMaxThreads = 256;
    void reset(int64_t total, int threads);

    // Runs work(piece) for pieces until none is left, then waits until all threads' are done.
    template <class Work>
    void run(int thread, Work work) {
        for (int64_t piece; (piece = next(thread)) >= 0;) {
            work(piece);
            done_.fetch_add(1, std::memory_order_release);
        }
        wait();
    }

  private:
    int64_t next(int thread);
    void wait() const;

    struct alignas(64) Run {
        std::atomic<int64_t> at{0};
        int64_t stop = 0;
    };
    Run runs_[kMaxThreads];
    int threads_ = 1;
    int64_t total_ = 0;
    alignas(64) std::atomic<int64_t> done_{0};
};

using Job = void (*)(void* context, int thread);

// Runs job(context, thread) on the caller and on up to width - 1 other threads; returns when the caller's has returned
// and no other is inside the job. The job must be right with any number of them. One caller at a time.
void run(Job job, void* context, int width);
int threads();
bool set_threads(int count, const int32_t* cpus);

}  // namespace lm
