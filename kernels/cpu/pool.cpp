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
#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace lm {
namespace {

// About 100 us on a 4 GHz core: longer than the Python between two calls of one layer, shorter than anyone notices.
constexpr int kSpins = 4000;

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Denormals count, on every thread alike: a caller whose thread flushes them would otherwise get other bits.
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
        for (int i = 1; i < count; i++) {
            workers_.emplace_back([this, i] { work(i); });
            if (cpus) pin(workers_.back(), cpus[i - 1]);
        }
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            epoch_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int count() const { return count_; }

    void run(Job job, void* context) {
        job_ = job;
        context_ = context;
        if (count_ > 1) {
            running_.store(count_ - 1, std::memory_order_relaxed);
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
        for (int spins = 0; running_.load(std::memory_order_acquire) > 0; spins++) {
            if (spins < kSpins) pause_briefly();
            else std::this_thread::yield();
        }
    }

  private:
    void work(int thread) {
        DefaultFloats floats;
        for (uint64_t seen = 0;;) {
            seen = wait_after(seen);
            if (stop_) return;
            job_(context_, thread);
            running_.fetch_sub(1, std::memory_order_release);
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
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int> running_{0};
    std::atomic<int> asleep_{0};
    bool stop_ = false;
    std::mutex mutex_;
    std::condition_variable wake_;
};

Pool* pool = nullptr;
#if !defined(_WIN32)
pid_t owner = 0;
#endif

// A forked child has the pool's memory but none of its threads: it leaves that pool alone and makes its own.
Pool& current() {
#if !defined(_WIN32)
    if (pool && owner != getpid()) {
        int count = pool->count();
        pool = nullptr;
        set_threads(count, nullptr);
    }
#endif
    if (!pool) set_threads(1, nullptr);
    return *pool;
}

}  // namespace

void Barrier::wait() {
    int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
        if (spins < kSpins) pause_briefly();
        else std::this_thread::yield();
    }
}

void Queue::reset(int64_t total, int threads) {
    threads_ = threads;
    for (int i = 0; i < threads; i++) {
        runs_[i].at.store(total * i / threads, std::memory_order_relaxed);
        runs_[i].stop = total * (i + 1) / threads;
    }
}

int64_t Queue::next(int thread) {
    for (int i = 0; i < threads_; i++) {
        Run& run = runs_[(thread + i) % threads_];
        if (run.at.load(std::memory_order_relaxed) >= run.stop) continue;
        int64_t part = run.at.fetch_add(1, std::memory_order_relaxed);
        if (part < run.stop) return part;
    }
    return -1;
}

void run(Job job, void* context) { current().run(job, context); }

int threads() { return current().count(); }

bool set_threads(int count, const int32_t* cpus) {
    if (count < 1 || count > Queue::kMaxThreads) return false;
    try {
        std::unique_ptr<Pool> fresh(new Pool(count, cpus));
#if !defined(_WIN32)
        if (owner != getpid()) pool = nullptr;
        owner = getpid();
#endif
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
