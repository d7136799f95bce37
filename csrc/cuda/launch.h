// The CUDA launchers, host side. Each launches on `stream` of `device`, never synchronises,
// allocates nothing, and returns the CUDA status of its own launch (0: none failed).
#pragma once
#include <stdint.h>

#include "../problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// See cpu/decode.h; every pointer but the arrays of pointers is device memory, the workspace aligned to 256 bytes.
// problem->tile: voxels a region (0: the default).
int64_t tcam_decode_cuda_workspace(const tcam_problem* problem, int backward);
int tcam_decode_cuda(const tcam_problem* problem, const tcam_inputs* inputs, void* out, void* workspace, int device,
                     void* stream);
int tcam_decode_backward_cuda(const tcam_problem* problem, const void* grad_out, const tcam_inputs* inputs,
                              const tcam_gradients* gradients, void* workspace, int device, void* stream);
int tcam_decode_loss_cuda(const tcam_problem* problem, const tcam_objective* objective, const tcam_inputs* inputs,
                          double* losses, const tcam_gradients* gradients, void* workspace, int device, void* stream);
int tcam_resample_axis_cuda(const tcam_resample* problem, const double bounds[2], const void* in, void* out, int device,
                            void* stream);
int tcam_normals_cuda(const tcam_normals* normals, float* out, int device, void* stream);

// The kernels that a problem takes where a block may have `shared_limit` bytes of shared memory, and why not faster ones, as
// text. `output`: 0 the volume, 1 the losses alone, 2 gradients. Needs no device.
void tcam_decode_cuda_explain(const tcam_problem* problem, int output, int shared_limit, char* text, int size);

int tcam_cuda_info(int* runtime, int* driver, int* devices);
int tcam_cuda_shared_limit(int device, int* bytes);  // of shared memory that a block may have
const char* tcam_cuda_error(int status);

#ifdef __cplusplus
}
#endif
