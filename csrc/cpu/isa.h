#pragma once
#include "voxel_core.h"

namespace tcam {
struct InstructionSet {
  const char* name;
  const Engine* (*engine)(int kind);
};
// The set that TCAM_CPU_ISA names, or the best that this machine runs. It is chosen once per process.
const InstructionSet& instruction_set();
}  // namespace tcam
