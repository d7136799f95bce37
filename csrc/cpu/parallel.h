// A parallel loop over independent tasks. Results do not depend on which thread runs which task.
#pragma once
#include <omp.h>
#include <pthread.h>

#include <atomic>

namespace tcam {

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
    for (long t = 0; t < tasks; ++t) f(t, 0);
    return;
  }
  std::atomic<long> next{0};
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    for (long t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(t, thread);
  }
}

}  // namespace tcam
