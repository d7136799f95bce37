// A small SIMT machine on the CPU: every CUDA thread is a fiber, a block runs on one OS thread.
//
// It exists to find wrong kernels, so it stops with a message where a GPU continues silently. Shared
// memory starts as NaNs, and each array has its own heap block, so that AddressSanitizer sees its
// ends. A barrier or warp function that some threads miss ends the program. The order in which
// threads run is a parameter (Schedule). Under ThreadSanitizer each fiber counts as a thread, and
// barriers are the only order between threads, so that races between barriers show.
//
// cuda_runtime.h in this folder gives it CUDA's names.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "fiber.h"

namespace simt {

enum class Order { forward, reverse, shuffled };  // of threads in a block, and of blocks

struct Schedule {
  Order order = Order::forward;
  bool greedy = false;        // each warp runs as far ahead of the others as it can
  bool early_copies = false;  // asynchronous copies complete at once, not at the wait
  unsigned seed = 1;
  int os_threads = 1;
};
inline Schedule schedule;

struct Device {
  int shared_limit = 227 << 10, processors = 2;
  bool warpgroups = true;
};
inline Device device;    // the properties that launchers query
inline int failure = 0;  // status of the next cudaFuncSetAttribute, which precedes every launch of a fused kernel

class Machine;
inline thread_local Machine* machine = nullptr;

class Machine {
 public:
  Index grid{}, block{}, block_index{};
  size_t shared_limit = 0;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;

  void run_block() {
    Unwatched u;
    start();
    for (position_ = 0;;) {
      const int next = first_runnable();
      if (next < 0) break;
      position_ = next;
      switch_to(host_, *fibers_[order_[next]], false);
    }
    for (int i = 1; i < count_ && !alive_; ++i)
      if (fibers_[i]->barriers != fibers_[0]->barriers) {
        current = fibers_[i].get();
        die("__syncthreads reached by some threads of the block only");
      }
    for (const Named& b : named_)
      if (!alive_ && b.arrived) die("threads arrived at a named barrier at which no thread waited");
    if (alive_) die("deadlock: threads wait for others that never arrive (divergent barrier or warp function)");
    acquire(this);
  }

  void barrier() {
    Unwatched u;
    Fiber& me = *current;
    ++me.barriers;
    release(this);
    if (++waiting_ == alive_) {
      open_barrier();
    } else {
      me.state = State::at_barrier;
      yield();
    }
    acquire(this);
  }

  // bar.sync (wait) and bar.arrive of the PTX ISA.
  void named_barrier(int id, int threads, bool wait) {
    Unwatched u;
    if (id < 1 || id > 15) die("a named barrier outside 1..15 (0 is __syncthreads)");
    if (threads % 32 || threads <= 0) die("a named barrier for a number of threads that is not a multiple of 32");
    Named& b = named_[id];
    if (b.arrived && b.threads != threads) die("threads disagree on how many a named barrier waits for");
    b.threads = threads;
    char* generation = &b.generations[b.generation];
    release(generation);
    if (++b.arrived == threads) {
      for (Fiber* f : b.waiting) f->state = State::running;
      b.waiting.clear();
      b.arrived = 0;
      b.generation ^= 1;
    } else if (wait) {
      b.waiting.push_back(current);
      current->state = State::at_named_barrier;
      yield();
    }
    if (wait) acquire(generation);
  }

  // The last lane of `mask` to arrive runs finish(first thread of the warp) for all lanes.
  template <class F>
  void warp_function(int function, uint32_t mask, F&& finish) {
    Unwatched u;
    Fiber& me = *current;
    const int warp = me.linear & ~31;
    if (!(mask >> me.lane & 1)) die("a lane calls a warp function with a mask that excludes it");
    me.function = function;
    me.mask = mask;
    me.state = State::in_warp_function;
    release(&fibers_[warp]->function);
    if (all_there(warp, function, mask)) {
      finish(warp);
      for (int l = 0; l < 32; ++l)
        if (mask >> l & 1) fibers_[warp + l]->state = State::running;
    } else {
      yield();
    }
    acquire(&fibers_[warp]->function);
  }

  Fiber& fiber(int linear) { return *fibers_[linear]; }
  bool is_thread(int linear) const { return linear < count_; }

  // The next array of shared memory. All threads take the same arrays in the same order.
  void* take_shared(size_t bytes) {
    Unwatched u;
    const size_t k = taken_[current->linear]++;
    if (k == shared_.size()) {
      shared_used_ += (bytes + 15) & ~size_t(15);
      if (shared_used_ > shared_limit) die("more shared memory taken than the launch asked for");
      shared_.emplace_back(static_cast<char*>(aligned_alloc(128, (bytes + 127) & ~size_t(127))), &free);
      shared_bytes_.push_back(bytes);
      memset(shared_.back().get(), 0xff, bytes);  // NaNs
#if defined(__SANITIZE_ADDRESS__)
      __asan_poison_memory_region(shared_.back().get() + bytes, ((bytes + 127) & ~size_t(127)) - bytes);
#endif
    } else if (shared_bytes_[k] != bytes) {
      die("threads disagree on the layout of shared memory");
    }
    return shared_[k].get();
  }

  static void entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    acquire(machine->current);
    (*machine->body)();
    release(machine);
    {
      Unwatched u;
      Machine& m = *machine;
      if (!m.current->copies.empty()) die("an asynchronous copy is left without a wait");
      if (!m.current->products.empty()) die("a product of a warpgroup is left without a wait");
      m.current->state = State::done;
      if (--m.alive_ && m.waiting_ == m.alive_) m.open_barrier();
    }
    machine->leave();
    abort();
  }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> order_, rank_;
  std::vector<size_t> taken_, shared_bytes_;
  std::vector<std::unique_ptr<char, void (*)(void*)>> shared_;
  size_t shared_used_ = 0;
  int count_ = 0, alive_ = 0, waiting_ = 0, position_ = 0;
  struct Named {
    int threads = 0, arrived = 0, generation = 0;
    char generations[2];  // addresses by which ThreadSanitizer orders the threads
    std::vector<Fiber*> waiting;
  } named_[16];
  Fiber host_;
  std::mt19937 random_{1};

  void start() {
    count_ = static_cast<int>(block.x * block.y * block.z);
    alive_ = count_;
    waiting_ = 0;
    for (size_t k = 0; k < shared_.size(); ++k) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(shared_[k].get(), (shared_bytes_[k] + 127) & ~size_t(127));
#endif
    }
    shared_.clear();
    shared_bytes_.clear();
    shared_used_ = 0;
    taken_.assign(count_, 0);
    while (static_cast<int>(fibers_.size()) < count_) fibers_.emplace_back(new Fiber);
    order_.resize(count_);
    rank_.resize(count_);
    for (int i = 0; i < count_; ++i) order_[i] = schedule.order == Order::reverse ? count_ - 1 - i : i;
    random_.seed(schedule.seed + block_index.x);
    if (schedule.order == Order::shuffled) std::shuffle(order_.begin(), order_.end(), random_);
    for (int i = 0; i < count_; ++i) rank_[order_[i]] = i;
#if defined(__SANITIZE_THREAD__)
    host_.tsan = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    void* at;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &at, &host_.stack_bytes);
    pthread_attr_destroy(&attributes);
    host_.stack = static_cast<char*>(at);
#endif
    for (int i = 0; i < count_; ++i) {
      Fiber& f = *fibers_[i];
      const unsigned n = static_cast<unsigned>(i);
      f.index = {n % block.x, n / block.x % block.y, n / (block.x * block.y)};
      f.linear = i;
      f.lane = i & 31;
      f.state = State::running;
      f.barriers = 0;
      f.fenced = f.copies_seen = false;
      f.group = 0;
      f.unseen.clear();
      prepare(f, &Machine::entry);
#if defined(__SANITIZE_THREAD__)
      __tsan_release(&f);
#endif
    }
  }

  void switch_to(Fiber& from, Fiber& to, bool leaving) {
    current = &to;
    (void)leaving;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.tsan, 1 /* orders nothing */);
#endif
    simt_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  }

  __attribute__((noinline, no_sanitize("thread"))) void leave() {  // ends a thread
    Fiber& me = *current;
    current = &host_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, host_.stack, host_.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(host_.tsan, 1);
#endif
    simt_switch(&me.stack_pointer, host_.stack_pointer);
  }

  int first_runnable() {
    for (int i = 0; i < count_; ++i) {
      const int at = (position_ + i) % count_;
      if (fibers_[order_[at]]->state == State::running) return at;
    }
    return -1;
  }

  // Switches to another thread that can run, or to the host if none can.
  void yield() {
    Fiber& me = *current;
    if (schedule.greedy) {
      const int warp = me.linear & ~31;
      for (int i = warp; i < std::min(warp + 32, count_); ++i)
        if (fibers_[i]->state == State::running && i != me.linear) {
          position_ = rank_[i];
          return switch_to(me, *fibers_[i], false);
        }
    }
    for (int i = 1; i <= count_; ++i) {
      const int at = (position_ + i) % count_;
      Fiber& f = *fibers_[order_[at]];
      if (f.state != State::running) continue;
      if (&f == &me) return;
      position_ = at;
      return switch_to(me, f, false);
    }
    switch_to(me, host_, false);
  }

  void open_barrier() {
    waiting_ = 0;
    for (int i = 0; i < count_; ++i)
      if (fibers_[i]->state == State::at_barrier) fibers_[i]->state = State::running;
  }

  bool all_there(int warp, int function, uint32_t mask) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      if (warp + l >= count_ || fibers_[warp + l]->state == State::done)
        die("warp function: a lane of the mask has left the kernel");
      const Fiber& f = *fibers_[warp + l];
      if (f.state != State::in_warp_function || f.function != function || f.mask != mask) return false;
    }
    return true;
  }
};

inline void die(const char* what) {
  fprintf(stderr, "simt: %s", what);
  if (machine && machine->current) {
    const Index b = machine->block_index, t = machine->current->index;
    fprintf(stderr, " [block %u,%u,%u thread %u,%u,%u]", b.x, b.y, b.z, t.x, t.y, t.z);
  }
  fprintf(stderr, "\n");
  fflush(stderr);
  _Exit(86);
}

// Runs `body` once for each thread of the grid.
inline void launch(Index grid, Index block, size_t shared_bytes, const std::function<void()>& body) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::atomic<uint64_t> next{0};
  static std::vector<std::unique_ptr<Machine>> machines;  // kept, as the fibers' stacks are costly to allocate
  const int workers = std::max(schedule.os_threads, 1);
  while (static_cast<int>(machines.size()) < workers) machines.emplace_back(new Machine);
  auto work = [&](int worker) {
    Unwatched u;
    Machine& m = *machines[worker];
    machine = &m;
    m.grid = grid;
    m.block = block;
    m.shared_limit = shared_bytes;
    m.body = &body;
    for (uint64_t n; (n = next++) < blocks;) {
      const uint64_t b = schedule.order == Order::forward ? n : blocks - 1 - n;
      m.block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (uint64_t(grid.x) * grid.y))};
      m.run_block();
    }
    machine = nullptr;
  };
  if (workers == 1) return work(0);
  std::vector<std::thread> threads;
  for (int i = 0; i < workers; ++i) threads.emplace_back(work, i);
  for (std::thread& t : threads) t.join();
}

template <class T, class Source>
T shuffle(int function, uint32_t mask, T value, Source source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "");
  Fiber& me = *machine->current;
  memcpy(me.in, &value, sizeof value);
  me.in[2] = static_cast<uint32_t>(source(me.lane));
  machine->warp_function(function, mask, [&](int warp) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      Fiber& to = machine->fiber(warp + l);
      const uint32_t from = to.in[2] & 31;
      if (!(mask >> from & 1)) die("shuffle from a lane outside the mask");
      memcpy(to.out, machine->fiber(warp + static_cast<int>(from)).in, 8);
    }
  });
  T result;
  memcpy(&result, me.out, sizeof result);
  return result;
}

}  // namespace simt
