// The CUDA launchers, host side. Each launches on `stream` of `device`, never synchronises,
// allocates nothing, and returns the CUDA status of its own launch (0: none failed).
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// See tcam_resample_plane_cpu; pointers are device memory.
int tcam_resample_plane_cuda(const void* plane, int64_t m0, int64_t m1, int64_t channels, int64_t n0, int64_t n1,
                             int align_corners, int padding, int dtype, void* out, int device, void* stream);

int tcam_cuda_info(int* runtime, int* driver, int* devices);
const char* tcam_cuda_error(int status);

#ifdef __cplusplus
}
#endif
