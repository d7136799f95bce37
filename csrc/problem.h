// The plain structs that cross the boundary between a host language and the kernels.
// C only: any host that can fill a struct (pybind11, ctypes, a stable-ABI shim) can call.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { TCAM_MAX_LAYERS = 6, TCAM_MAX_WIDTH = 256, TCAM_MAX_OUT = 64, TCAM_MAX_PLANES = 16, TCAM_MAX_AXES = 4 };

typedef enum { TCAM_F32 = 0, TCAM_F64 = 1, TCAM_F16 = 2, TCAM_BF16 = 3, TCAM_U8 = 4, TCAM_TF32 = 5, TCAM_I64 = 6 } tcam_dtype;
typedef enum { TCAM_PAD_BORDER = 0, TCAM_PAD_ZEROS = 1, TCAM_PAD_REFLECTION = 2 } tcam_padding;

// An activation and its parameter (tcam_ext/activations.py); `kind` counts in the lists of maths/activation.h.
typedef struct {
  int32_t kind;
  double parameter;
} tcam_activation;

// What becomes of the samples of several planes.
typedef enum { TCAM_CONCAT = 0, TCAM_SUM = 1, TCAM_PRODUCT = 2 } tcam_reduce;

// What points gather: the planes' features, or these projected through the first layer.
typedef enum { TCAM_AUTO = 0, TCAM_PROJECTED = 1, TCAM_FEATURES = 2 } tcam_formulation;

// A plane (B, C, rows, columns): which coordinate runs over its rows, which over its columns; row_axis < column_axis.
typedef struct {
  int32_t row_axis, column_axis;
  int64_t rows, columns;
} tcam_plane;

// What is decoded, and how. weights[l] is (width[l+1], width[l]); the first layer reads the reduced features of the planes
// (concatenated plane by plane), then a point's own: width[0] = (plane_count or 1) * channels + extra.
typedef struct {
  int64_t batch, channels;
  int32_t plane_count;
  int32_t reduce;      // tcam_reduce
  double plane_scale;  // that every sample of a plane is multiplied with
  tcam_plane planes[TCAM_MAX_PLANES];
  int64_t points;        // of all objects together; -1: a grid, of which the next three speak
  int64_t size[3];       // H, W, D of the whole volume
  int64_t lo[3], hi[3];  // the box decoded, in voxels, lo <= index < hi
  int32_t corners;       // voxels lie from corner to corner of the volume; 0: they are its cells
  int32_t axes;          // coordinates of a point; 3 for a grid
  int64_t extra;         // features that a point brings itself
  int64_t width[TCAM_MAX_LAYERS + 1];
  int32_t layers;
  tcam_activation activation[TCAM_MAX_LAYERS];  // of layers 1 to layers-1, from index 0
  tcam_activation output_activation;
  int32_t align_corners, padding;
  double noise_std;  // normal noise of so much is added to the reduced features of the planes, 0: none, as maths/noise.h has
  uint64_t
      noise_seed;     // it; keys have the object and the voxel of the whole grid, or the point of the object (see tcam_inputs)
  int32_t dtype;      // of planes, weights, biases, coordinates and their gradients: TCAM_F32 or TCAM_F64
  int32_t compute;    // of the hidden layers' products: equal to dtype, or TCAM_BF16, TCAM_F16 or TCAM_TF32 with TCAM_F32
  int32_t out_dtype;  // of the volume and of its gradient
  int32_t grad_planes, grad_decoder, grad_points, grad_extra;  // backward only: which gradients are wanted
  int32_t threads;
  int32_t formulation;  // of points: tcam_formulation
  int32_t tile;  // voxels a tile; 0 takes the default. Results do not depend on it; CUDA gradients do in their last bits.
} tcam_problem;

// Contiguous arrays; those marked * may be null.
typedef struct {
  const void* const* planes;   // plane_count
  const void* const* weights;  // layers
  const void* const* biases;   // layers, each *
  const double* bounds;        // *(B, 3, 2): the coordinates that a grid's axes run from and to; null: -1 and 1
  const void* points;          // (points, axes) coordinates; of a grid: null
  const int64_t* objects;      // *(points): whose planes a point reads; null: points/batch points each, in order. (With it the
                               // noise of a point belongs to its number among all.)
  const void* extra;           // (points, extra); of a grid (B, voxels of the box, extra)
} tcam_inputs;

// Where the gradients wanted go; all are overwritten.
typedef struct {
  void* const* planes;
  void* const* weights;
  void* const* biases;  // null entries: no bias
  void *points, *extra;
} tcam_gradients;

// What decode_grid_loss compares the decoded volume with.
typedef struct {
  const void* target;    // (B, C_out, box), contiguous
  int32_t target_dtype;  // any; TCAM_U8 means value/255
  int32_t loss;          // index into the list of maths/loss.h
  double beta;           // of smooth_l1
  int32_t per_object;    // 1: gradients of weights and biases have a leading axis B
} tcam_objective;

// (outer, n, inner) resampled along the middle axis, from its texels to the voxels [lo, hi) of a grid's axis; adjoint: back.
typedef struct {
  int64_t outer, inner, texels, size, lo, hi;
  int32_t align_corners, padding, corners, adjoint;
  int32_t dtype;  // TCAM_F32 or TCAM_F64
  int32_t threads;
} tcam_resample;

// Standard normals (objects, count), float32, of a seed and a stream of maths/noise.h: the noise of a plane's texels.
typedef struct {
  uint64_t seed;
  int64_t objects, count;
  int32_t stream;
  int32_t threads;
} tcam_normals;

#ifdef __cplusplus
}
#endif
