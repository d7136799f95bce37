#pragma once
#include "voxel_core.h"

namespace tcam {
struct InstructionSet {
  const char* name;
  const Engine* (*engine)(int kind);
};
// The best set this machine runs, or the one TCAM_CPU_ISA names. Chosen once a process.
const InstructionSet& instruction_set();
}  // namespace tcam
