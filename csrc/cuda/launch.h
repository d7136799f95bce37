// The ops on CUDA over raw pointers, as plain C functions. Each launches its kernels on `stream` of `device`, does not
// synchronise, allocates nothing, and returns the first CUDA error of its launches (0: success).
#pragma once
#include <stdint.h>

#include "../problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// The counterparts of the functions in cpu/decode.h. Structs and arrays of pointers are in host memory, all that they point to
// in device memory. The workspace is aligned to 256 bytes. problem->tile is the number of voxels in a region (0: the default).
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

// Writes to `text` (`size` bytes) which kernels a problem takes on a device that allows `shared_limit` bytes of shared memory a
// block and runs wgmma or not, and why not faster ones. `output`: 0 the volume, 1 the losses alone, 2 gradients. Works without
// a device.
void tcam_decode_cuda_explain(const tcam_problem* problem, int output, int shared_limit, int warpgroups, char* text, int size);

int tcam_cuda_info(int* runtime, int* driver, int* devices);
// The bytes of shared memory that a block of a device may have, and whether it runs the kernels with wgmma.
int tcam_cuda_device(int device, int* shared_limit, int* warpgroups);
const char* tcam_cuda_error(int status);

#ifdef __cplusplus
}
#endif
