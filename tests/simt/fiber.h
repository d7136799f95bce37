// A fiber, which runs one CUDA thread in simt.h: its stack, the switch between fibers, and the calls that tell the sanitizers.
#pragma once
#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace simt {

[[noreturn]] inline void die(const char* what);

// ---- sanitizers --------------------------------------------------------------------------

#if defined(__SANITIZE_THREAD__)
struct Unwatched {  // hides the emulator's own memory accesses from ThreadSanitizer
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
inline void release(void* p) { __tsan_release(p); }
inline void acquire(void* p) { __tsan_acquire(p); }
#else
struct Unwatched {
  ~Unwatched() {}
};
inline void release(void*) {}
inline void acquire(void*) {}
#endif

// ---- fibers ------------------------------------------------------------------------------

struct Index {
  unsigned x, y, z;
};

enum class State : uint8_t { running, in_warp_function, at_barrier, at_named_barrier, done };

struct Fiber {
  Index index{};
  int linear = 0, lane = 0;
  State state = State::done;
  int function = 0;   // the warp function it waits in
  uint32_t mask = 0;  // the lanes it waits for
  int barriers = 0;
  uint32_t in[8], out[8];  // operands and results of warp functions
  const void* address = nullptr;
  struct Copy {
    void* to;
    const void* from;
    int group;
  };
  std::vector<Copy> copies;  // asynchronous copies in flight, in ascending order of groups
  int groups = 0;            // of copies, closed so far
  struct Product {           // of a warpgroup, in flight
    float* to;
    int columns;
    float before[64];  // *to when the first product to it began; later ones leave it
    bool first;
    uint32_t a[4];           // A in registers, or
    const uint16_t* a_rows;  // A in shared memory
    const uint16_t* rows;    // B
    int k_step, block;
    int group;
    void (*run)(const Product&);
  };
  std::vector<Product> products;
  int group = 0;                    // the open group
  bool fenced = false;              // whether warpgroup_fence was called since the last wait
  bool copies_seen = false;         // whether products_fence was called; later copies are not of operands
  std::vector<const void*> unseen;  // where copies and stores of matrices wrote that no products_fence follows yet
  float wide[64];                   // results of a product
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

// Saves the callee-saved registers on the current stack, and continues where `to` was saved.
extern "C" void simt_switch(void** save, void* to);
constexpr int saved_registers = 6;  // that simt_switch restores
#if defined(SIMT_MAIN)
#if defined(__x86_64__)
asm(R"(.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#else
#error "fiber.h: the fiber switch is written for x86-64"
#endif
#endif

// Allocates the fiber's stack at first use, and sets the fiber to begin at `entry`.
inline void prepare(Fiber& f, void (*entry)()) {
  if (!f.stack) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    f.stack_bytes = 256 << 10;
#else
    f.stack_bytes = 64 << 10;
#endif
    constexpr size_t guard = 4096;
    void* p = mmap(nullptr, f.stack_bytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) die("no memory for a stack");
    mprotect(p, guard, PROT_NONE);
    f.stack = static_cast<char*>(p) + guard;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack, f.stack_bytes);
#endif
  auto* top = reinterpret_cast<uint64_t*>(f.stack + f.stack_bytes);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < saved_registers; ++i) *--top = 0;
  f.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
  if (f.tsan) __tsan_destroy_fiber(f.tsan);
  f.tsan = __tsan_create_fiber(0);
#endif
}

}  // namespace simt
