// The choice of the instruction set at run time, among those that were compiled (TCAM_HAS_*).
#include "isa.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tcam {
namespace {

bool always() { return true; }
#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Linux gives a process the state of AMX tiles on request: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
[[maybe_unused]] bool has_amx() {
#if defined(__linux__)
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;  // CPUID 7.0, EDX
  unsigned a, b, c, d;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tiles) &&
         syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  InstructionSet set;
  bool (*runs)();
};

// Candidates, best first.
// clang-format off
const Candidate candidates[] = {
#ifdef TCAM_HAS_EMULATED
    {{"emulated", emulated::engine}, always},
#endif
#ifdef TCAM_HAS_AMX
    {{"amx", amx::engine}, has_amx},
#endif
#ifdef TCAM_HAS_AVX512BF16
    {{"avx512bf16", avx512bf16::engine}, has_avx512bf16},
#endif
#ifdef TCAM_HAS_AVX512
    {{"avx512", avx512::engine}, has_avx512},
#endif
#ifdef TCAM_HAS_AVX2
    {{"avx2", avx2::engine}, has_avx2},
#endif
    {{"portable", portable::engine}, always},
};
// clang-format on

const InstructionSet& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* wanted = getenv("TCAM_CPU_ISA");
  for (const Candidate& c : candidates)
    if ((!wanted || !*wanted || !strcmp(wanted, c.set.name)) && c.runs()) return c.set;  // asked only for what is wanted
  for (const Candidate& c : candidates)  // TCAM_CPU_ISA names an unknown or unavailable set: info.py says so
    if (c.runs()) return c.set;
  __builtin_unreachable();
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

bool bf16_is_fast() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return instruction_set().engine(2) != nullptr && (__builtin_cpu_is("amd") || !strcmp(instruction_set().name, "amx"));
#else
  return false;
#endif
}

}  // namespace tcam
