// The ops on the CPU over raw pointers, for any host language; bindings.cpp calls them.
#pragma once
#include "../problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of workspace, 64-byte aligned, that the calls below need.
int64_t tcam_decode_cpu_workspace(const tcam_problem* problem, int backward);

// out = decoder(planes) in problem->out_dtype: (B, C_out, box) for a grid, (points, C_out) for points. Without layers, out is
// the features, (points, width[0] - extra).
void tcam_decode_cpu(const tcam_problem* problem, const tcam_inputs* inputs, void* out, void* workspace);

// The gradients of <grad_out, out> that problem->grad_* selects.
void tcam_decode_backward_cpu(const tcam_problem* problem, const void* grad_out, const tcam_inputs* inputs,
                              const tcam_gradients* gradients, void* workspace);

// The losses (B) of a grid, each summed over C_out and voxels, and in the same pass their gradients (tcam_objective says
// whether per object or of the total). Nothing is divided: the caller applies 1/N last. The workspace is that of backward if a
// gradient is wanted and that of forward otherwise.
void tcam_decode_loss_cpu(const tcam_problem* problem, const tcam_objective* objective, const tcam_inputs* inputs,
                          double* losses, const tcam_gradients* gradients, void* workspace);

// out = in resampled along one axis. tcam_inputs describes `bounds`; null: -1 and 1.
void tcam_resample_axis_cpu(const tcam_resample* problem, const double bounds[2], const void* in, void* out);

// out (objects, count) = standard normals.
void tcam_normals_cpu(const tcam_normals* normals, float* out);
// Philox4x32-10 of a counter and a key, in place.
void tcam_philox_cpu(uint32_t counter[4], uint32_t k0, uint32_t k1);

const char* tcam_cpu_isa(void);                                     // the instruction set in use; TCAM_CPU_ISA selects another
int tcam_cpu_has_bf16(void);                                        // 1 if bfloat16 products use bfloat16 instructions
int tcam_cpu_bf16_is_fast(void);                                    // 1 if those are faster than float32 products
int tcam_cpu_forked(void);                                          // 1 in a forked child, which runs serially
double tcam_cpu_peak_flops(int kind, double seconds, int threads);  // measured; kind 0: float32, 1: float64, 2: bfloat16

#ifdef __cplusplus
}
#endif
