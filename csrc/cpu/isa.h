#pragma once
#include "voxel_core.h"

namespace tcam {
struct InstructionSet {
  const char* name;
  const Engine* (*engine)(int kind);
};
// The set that TCAM_CPU_ISA names, or the best that this machine runs. It is chosen once per process.
const InstructionSet& instruction_set();

// Whether bfloat16 products are faster than float32 multiply-adds here: in AMX tiles they are, and as dot products on AMD,
// which by its instruction rates have twice the products a cycle; on Intel half (measured on a Xeon: 240 and 479 GFLOP/s).
bool bf16_is_fast();
}  // namespace tcam
