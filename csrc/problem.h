// The plain structs that cross the boundary between a host language and the kernels.
// C only: any host that can fill a struct (pybind11, ctypes, a stable-ABI shim) can call.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { TCAM_MAX_LAYERS = 6, TCAM_MAX_WIDTH = 256, TCAM_MAX_OUT = 16 };

typedef enum { TCAM_F32 = 0, TCAM_F64 = 1, TCAM_F16 = 2, TCAM_BF16 = 3, TCAM_U8 = 4, TCAM_TF32 = 5 } tcam_dtype;
typedef enum { TCAM_PAD_BORDER = 0, TCAM_PAD_ZEROS = 1 } tcam_padding;

// One decode_grid problem. Planes are (B,C,h,w), (B,C,w,d), (B,C,h,d), contiguous;
// weights[l] is (width[l+1], width[l]), width[0] = 3C; the box is in voxels of `size`.
typedef struct {
  int64_t batch, channels;
  int64_t planes[3];     // h, w, d
  int64_t size[3];       // H, W, D of the whole volume
  int64_t lo[3], hi[3];  // the box decoded, lo <= index < hi
  int64_t width[TCAM_MAX_LAYERS + 1];
  int32_t layers;
  int32_t activation;         // index into tcam_activations()
  int32_t output_activation;  // index into tcam_output_activations()
  int32_t align_corners, padding;
  int32_t dtype;      // of planes, weights, biases and their gradients: TCAM_F32 or TCAM_F64
  int32_t compute;    // of the hidden layers' products: equal to dtype, or TCAM_BF16, TCAM_F16 or TCAM_TF32 with TCAM_F32
  int32_t out_dtype;  // of the volume and of its gradient
  int32_t grad_planes, grad_decoder;  // backward only: which gradients are wanted
  int32_t threads;
  int32_t tile;  // voxels a tile; 0 takes the default. Results do not depend on it; CUDA gradients do in their last bits.
} tcam_decode_grid;

// What decode_grid_loss compares the decoded volume with.
typedef struct {
  const void* target;    // (B, C_out, box), contiguous
  int32_t target_dtype;  // any; TCAM_U8 means value/255
  int32_t loss;          // index into the list of maths/loss.h
  double beta;           // of smooth_l1
  int32_t per_object;    // 1: gradients of weights and biases have a leading axis B
} tcam_objective;

#ifdef __cplusplus
}
#endif
