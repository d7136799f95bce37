// decode_grid on the CPU over raw pointers. Any host can call this; bindings.cpp does.
#pragma once
#include "../problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of workspace (64-byte aligned) that the call below needs.
int64_t tcam_decode_grid_cpu_workspace(const tcam_decode_grid* problem, int backward);

// volume (B, C_out, box) = decoder(planes). planes[p], weights[l], biases[l] (null: no bias) contiguous, of
// problem->dtype; volume of problem->out_dtype.
void tcam_decode_grid_cpu(const tcam_decode_grid* problem, const void* const planes[3], const void* const* weights,
                          const void* const* biases, void* volume, void* workspace);

// Gradients of <grad_volume, volume>. grad_planes is read where problem->grad_planes, grad_weights and
// grad_biases (null entries: no bias) where problem->grad_decoder; all are overwritten.
void tcam_decode_grid_backward_cpu(const tcam_decode_grid* problem, const void* grad_volume, const void* const planes[3],
                                   const void* const* weights, const void* const* biases, void* const grad_planes[3],
                                   void* const* grad_weights, void* const* grad_biases, void* workspace);

// losses (B) = sums of the pointwise loss over C_out and voxels, and in the same pass the gradients of each sum (or of their
// total over B, see tcam_objective), undivided: the caller applies 1/N last. Gradients as above; the workspace is that of
// backward where a gradient is wanted, of forward otherwise.
void tcam_decode_grid_loss_cpu(const tcam_decode_grid* problem, const tcam_objective* objective, const void* const planes[3],
                               const void* const* weights, const void* const* biases, double* losses,
                               void* const grad_planes[3], void* const* grad_weights, void* const* grad_biases,
                               void* workspace);

// (m0, m1, n) planes resampled to (n0, n1, n): the box [lo, hi) of an n0 x n1 grid of voxels, channels last.
void tcam_resample_plane_cpu(const void* plane, int64_t m0, int64_t m1, int64_t channels, int64_t n0, int64_t n1,
                             int align_corners, int padding, int dtype, int threads, void* out);

const char* tcam_cpu_isa(void);                                     // the instruction set chosen; TCAM_CPU_ISA overrides
int tcam_cpu_has_bf16(void);                                        // 1 where bfloat16 products run on bfloat16 instructions
int tcam_cpu_forked(void);                                          // 1 in a forked child, which runs serially
double tcam_cpu_peak_flops(int kind, double seconds, int threads);  // measured; kind 0 f32, 1 f64, 2 bf16

#ifdef __cplusplus
}
#endif
