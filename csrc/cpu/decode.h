// The ops on the CPU over raw pointers. Any host can call this; bindings.cpp does.
#pragma once
#include "../problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of workspace (64-byte aligned) that the calls below need.
int64_t tcam_decode_cpu_workspace(const tcam_problem* problem, int backward);

// out = decoder(planes), of problem->out_dtype: (B, C_out, box) of a grid, (points, C_out) of points. Without layers: the
// features, (points, width[0] - extra).
void tcam_decode_cpu(const tcam_problem* problem, const tcam_inputs* inputs, void* out, void* workspace);

// Gradients of <grad_out, out>: those of problem->grad_*.
void tcam_decode_backward_cpu(const tcam_problem* problem, const void* grad_out, const tcam_inputs* inputs,
                              const tcam_gradients* gradients, void* workspace);

// Of a grid: losses (B) = sums of the pointwise loss over C_out and voxels, and in the same pass the gradients of each sum (or
// of their total over B, see tcam_objective), undivided: the caller applies 1/N last. The workspace is that of backward where a
// gradient is wanted, of forward otherwise.
void tcam_decode_loss_cpu(const tcam_problem* problem, const tcam_objective* objective, const tcam_inputs* inputs,
                          double* losses, const tcam_gradients* gradients, void* workspace);

// `bounds` (null: -1 and 1): see tcam_inputs.
void tcam_resample_axis_cpu(const tcam_resample* problem, const double bounds[2], const void* in, void* out);

// out (objects, count).
void tcam_normals_cpu(const tcam_normals* normals, float* out);
// Philox4x32-10 of a counter and a key, in place.
void tcam_philox_cpu(uint32_t counter[4], uint32_t k0, uint32_t k1);

const char* tcam_cpu_isa(void);                                     // the instruction set chosen; TCAM_CPU_ISA overrides
int tcam_cpu_has_bf16(void);                                        // 1 where bfloat16 products run on bfloat16 instructions
int tcam_cpu_forked(void);                                          // 1 in a forked child, which runs serially
double tcam_cpu_peak_flops(int kind, double seconds, int threads);  // measured; kind 0 f32, 1 f64, 2 bf16

#ifdef __cplusplus
}
#endif
