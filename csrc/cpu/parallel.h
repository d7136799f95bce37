// A parallel loop over independent tasks. Results do not depend on which thread runs which task.
#pragma once
#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdint>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace tcam {

// While it lives, this thread takes subnormal floats for zero. Products with them take a hundred cycles or more, and training
// on volumes with an empty background makes many: gradients there shrink with the square of an output near 0.
class WithoutSubnormals {
 public:
  WithoutSubnormals() : before_(get()) { set(before_ | kBits); }
  ~WithoutSubnormals() { set(before_); }
  WithoutSubnormals(const WithoutSubnormals&) = delete;
  WithoutSubnormals& operator=(const WithoutSubnormals&) = delete;

 private:
#if defined(__SSE__)
  using Word = unsigned;
  static constexpr Word kBits = 0x8040;  // flush results to zero, take operands for zero
  static Word get() { return _mm_getcsr(); }
  static void set(Word w) { _mm_setcsr(w); }
#elif defined(__aarch64__)
  using Word = std::uint64_t;
  static constexpr Word kBits = 1ull << 24;
  static Word get() {
    Word w;
    asm volatile("mrs %0, fpcr" : "=r"(w));
    return w;
  }
  static void set(Word w) { asm volatile("msr fpcr, %0" ::"r"(w)); }
#else
  using Word = int;
  static constexpr Word kBits = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif
  Word before_;
};

// Whether this is a forked child. It runs serially, because libgomp's teams do not survive fork and would hang.
inline bool forked() {
  static std::atomic<bool> flag{false};
  static const bool installed = (pthread_atfork(nullptr, nullptr, [] { flag = true; }), true);
  (void)installed;
  return flag;
}

// Calls f(task, thread) for every task in [0, tasks), with thread < threads. It uses `omp parallel` alone, because the process
// shares torch's libgomp, which may be older than the compiler's.
template <class F>
void parallel_for(long tasks, int threads, F f) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || forked()) {
    WithoutSubnormals guard;
    for (long t = 0; t < tasks; ++t) f(t, 0);
    return;
  }
  std::atomic<long> next{0};
#pragma omp parallel num_threads(threads)
  {
    WithoutSubnormals guard;
    const int thread = omp_get_thread_num();
    for (long t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(t, thread);
  }
}

}  // namespace tcam
