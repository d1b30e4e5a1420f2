#include "pool.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#include <unistd.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace lm {
namespace {

// About 300 us on a 4 GHz core: longer than the Python between two calls of a layer, shorter than anyone notices.
constexpr int kSpins = 30000;

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins at first; later lets others run, perhaps the one that is waited for.
void wait_a_little(int spins) {
    if (spins < kSpins) pause_briefly();
    else std::this_thread::yield();
}

// On x86, denormals count on every thread alike: a caller whose thread flushes them would otherwise get other bits.
class DefaultFloats {
  public:
#if defined(__x86_64__) || defined(__i386__)
    DefaultFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~DefaultFloats() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#endif
};

void pin(std::thread& thread, int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    // Not being allowed to is no error: the thread then floats.
    pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);
#else
    (void)thread;
    (void)cpu;
#endif
}

class Pool {
  public:
    Pool(int count, const int32_t* cpus) : count_(count) {
        workers_.reserve(count);
        try {
            for (int i = 1; i < count; i++) {
                workers_.emplace_back([this, i] { work(i); });
                if (cpus) pin(workers_.back(), cpus[i - 1]);
            }
        } catch (...) {
            stop();  // a system that gives some threads but not all
            throw;
        }
    }

    ~Pool() { stop(); }

    int count() const { return count_; }

    // A job must not throw: others would still be inside it.
    void run(Job job, void* context, int width) noexcept {
        if (width > 1 && count_ > 1) {
            job_ = job;
            context_ = context;
            width_ = width;
            open_.store(epoch_.load() + 1);
            epoch_.fetch_add(1);  // sequentially consistent, so that a worker about to sleep is seen below
            if (asleep_.load() > 0) {
                std::lock_guard<std::mutex> lock(mutex_);
                wake_.notify_all();
            }
        }
        {
            DefaultFloats floats;
            job(context, 0);
        }
        open_.store(0);
        for (int spins = 0; inside_.load() > 0; spins++) wait_a_little(spins);
    }

  private:
    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            epoch_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    void work(int thread) noexcept {
        DefaultFloats floats;
        for (uint64_t seen = 0;;) {
            seen = wait_after(seen);
            if (stop_) return;
            // A worker that comes late finds the job closed, and leaves its context alone.
            inside_.fetch_add(1);
            if (open_.load() == seen && thread < width_) job_(context_, thread);
            inside_.fetch_sub(1);
        }
    }

    uint64_t wait_after(uint64_t seen) {
        for (int spins = 0; spins < kSpins; spins++) {
            uint64_t now = epoch_.load(std::memory_order_acquire);
            if (now != seen) return now;
            pause_briefly();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        asleep_.fetch_sub(1);
        return epoch_.load();
    }

    const int count_;
    std::vector<std::thread> workers_;
    Job job_ = nullptr;
    void* context_ = nullptr;
    int width_ = 1;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<uint64_t> open_{0};  // the epoch whose job may still be entered, or 0
    std::atomic<int> inside_{0};
    std::atomic<int> asleep_{0};
    bool stop_ = false;
    std::mutex mutex_;
    std::condition_variable wake_;
};

Pool* pool = nullptr;
pid_t owner = 0;

// A forked child has the pool's memory but none of its threads: it leaves that pool alone and makes its own.
Pool& current() {
    if (pool && owner != getpid()) {
        int count = pool->count();
        pool = nullptr;
        set_threads(count, nullptr);
    }
    if (!pool) set_threads(1, nullptr);
    return *pool;
}

}  // namespace

void Phase::reset(int64_t total, int threads) {
    threads_ = threads;
    total_ = total;
    done_.store(0, std::memory_order_relaxed);
    for (int i = 0; i < threads; i++) {
        runs_[i].at.store(total * i / threads, std::memory_order_relaxed);
        runs_[i].stop = total * (i + 1) / threads;
    }
}

int64_t Phase::next(int thread) {
    for (int i = 0; i < threads_; i++) {
        Run& run = runs_[(thread + i) % threads_];
        if (run.at.load(std::memory_order_relaxed) >= run.stop) continue;
        int64_t piece = run.at.fetch_add(1, std::memory_order_relaxed);
        if (piece < run.stop) return piece;
    }
    return -1;
}

void Phase::wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < total_; spins++) wait_a_little(spins);
}

void run(Job job, void* context, int width) { current().run(job, context, width); }

int threads() { return current().count(); }

bool set_threads(int count, const int32_t* cpus) {
    if (count < 1 || count > Phase::kMaxThreads) return false;
    try {
        std::unique_ptr<Pool> fresh(new Pool(count, cpus));
        if (owner != getpid()) pool = nullptr;
        owner = getpid();
        delete pool;
        pool = fresh.release();
        return true;
    } catch (const std::system_error&) {
        return false;
    } catch (const std::bad_alloc&) {
        return false;
    }
}

}  // namespace lm
