// Persistent threads that run one job together, the caller being thread 0.
//
// Between jobs they spin for a moment, because the next one usually follows within microseconds, then sleep.
#pragma once
#include <atomic>
#include <cstdint>

namespace lm {

// Lets the threads of one job wait for each other. Reusable at once.
class Barrier {
  public:
    explicit Barrier(int count) : count_(count) {}
    void wait();

  private:
    const int count_;
    std::atomic<int> arrived_{0};
    std::atomic<int> round_{0};
};

// What a job's threads share work with: parts [0, total) are cut into one run of neighbours per thread, so that each
// reads memory in order; who finishes early helps the others.
class Queue {
  public:
    static constexpr int kMaxThreads = 256;
    void reset(int64_t total, int threads);
    // The next part for this thread, or -1 when none is left.
    int64_t next(int thread);

  private:
    struct alignas(64) Run {
        std::atomic<int64_t> at{0};
        int64_t stop = 0;
    };
    Run runs_[kMaxThreads];
    int threads_ = 1;
};

using Job = void (*)(void* context, int thread);

// Runs job(context, thread) on every thread and returns when all are done. One caller at a time.
void run(Job job, void* context);
int threads();
bool set_threads(int count, const int32_t* cpus);

}  // namespace lm
