// The CUDA launchers, host side. Each launches on `stream` of `device`, never synchronises,
// allocates nothing, and returns the CUDA status of its own launch (0: none failed).
#pragma once
#include <stdint.h>

#include "../problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// See cpu/decode_grid.h; every pointer but the arrays of pointers is device memory, the workspace aligned to 256 bytes.
// problem->tile: voxels a region (0: the default).
int64_t tcam_decode_grid_cuda_workspace(const tcam_decode_grid* problem, int backward);
int tcam_decode_grid_cuda(const tcam_decode_grid* problem, const void* const planes[3], const void* const* weights,
                          const void* const* biases, void* volume, void* workspace, int device, void* stream);
int tcam_decode_grid_backward_cuda(const tcam_decode_grid* problem, const void* grad_volume, const void* const planes[3],
                                   const void* const* weights, const void* const* biases, void* const grad_planes[3],
                                   void* const* grad_weights, void* const* grad_biases, void* workspace, int device,
                                   void* stream);
int tcam_decode_grid_loss_cuda(const tcam_decode_grid* problem, const tcam_objective* objective, const void* const planes[3],
                               const void* const* weights, const void* const* biases, double* losses,
                               void* const grad_planes[3], void* const* grad_weights, void* const* grad_biases, void* workspace,
                               int device, void* stream);

// See tcam_resample_plane_cpu; pointers are device memory.
int tcam_resample_plane_cuda(const void* plane, int64_t m0, int64_t m1, int64_t channels, int64_t n0, int64_t n1,
                             int align_corners, int padding, int dtype, void* out, int device, void* stream);

int tcam_cuda_info(int* runtime, int* driver, int* devices);
const char* tcam_cuda_error(int status);

#ifdef __cplusplus
}
#endif
