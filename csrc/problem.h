// The structs that a host language passes to the kernels. They are plain C, so that any host that can fill a struct (pybind11,
// ctypes, a stable-ABI shim) can call the kernels.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Numbers skip[l] are multiples of TCAM_SKIP_STEP.
enum {
  TCAM_MAX_LAYERS = 16,
  TCAM_MAX_WIDTH = 512,
  TCAM_MAX_OUT = 256,
  TCAM_MAX_PLANES = 48,
  TCAM_MAX_AXES = 4,
  TCAM_SKIP_STEP = 32
};

// The enumerations as X(constant, name). A host reads the names from the binding and numbers them from 0.
#define TCAM_DTYPES(X) \
  X(TCAM_F32, float32) \
  X(TCAM_F64, float64) X(TCAM_F16, float16) X(TCAM_BF16, bfloat16) X(TCAM_U8, uint8) X(TCAM_TF32, tf32) X(TCAM_I64, int64)
#define TCAM_PADDINGS(X) X(TCAM_PAD_BORDER, border) X(TCAM_PAD_ZEROS, zeros) X(TCAM_PAD_REFLECTION, reflection)
#define TCAM_REDUCTIONS(X) /* how the samples of a group of planes are combined */ \
  X(TCAM_SUM, sum) X(TCAM_MEAN, mean) X(TCAM_PRODUCT, product)
#define TCAM_FORMULATIONS(X) /* what points gather: features, or features projected through the first layer */ \
  X(TCAM_AUTO, auto) X(TCAM_PROJECTED, projected) X(TCAM_FEATURES, features)

#define TCAM_CONSTANT(constant, name) constant,
typedef enum { TCAM_DTYPES(TCAM_CONSTANT) } tcam_dtype;
typedef enum { TCAM_PADDINGS(TCAM_CONSTANT) } tcam_padding;
typedef enum { TCAM_REDUCTIONS(TCAM_CONSTANT) } tcam_reduce;
typedef enum { TCAM_FORMULATIONS(TCAM_CONSTANT) } tcam_formulation;
#undef TCAM_CONSTANT

// An activation and its parameter (tcam_ext/activations.py). `kind` is an index into the lists of maths/activation.h.
typedef struct {
  int32_t kind;
  double parameter;
} tcam_activation;

// A plane (B, C, rows, columns) with the coordinates that select its row and its column, and its group. For grids on CUDA
// row_axis < column_axis.
// Groups are numbered from 0 in ascending order, so that the planes of a group follow one another.
typedef struct {
  int32_t row_axis, column_axis, group;
  int64_t rows, columns;
} tcam_plane;

// The fields of a problem. F(type, name) and A(type, name, count) follow from the tensors. O(type, name, default, least, most)
// is an option that the host sets within these limits. weights[l] is (width[l+1], width[l]), but weights[0] (first_width,
// width[0]): its first width[1] rows are layer 1's, and rows skip[l], skip[l] + 1, ... those of a layer l above that reads the
// features too: z_l is weights[l-1] h_(l-1) + biases[l-1] plus these rows of weights[0] f + biases[0], of the features f.
// biases[0] has first_width numbers; rows of both that are no layer's must be 0. f has the features of one group of planes
// after the other, then the extra features: width[0] = group_count * channels + extra. Concatenated planes are groups of one
// plane each.
#define TCAM_PROBLEM(F, A, O)                                                                                            \
  F(int64_t, batch)                                                                                                      \
  F(int64_t, channels)                                                                                                   \
  F(int32_t, plane_count)                                                                                                \
  F(int32_t, group_count)                                                                                                \
  O(int32_t, reduce, TCAM_SUM, TCAM_SUM, TCAM_PRODUCT) /* within a group */                                              \
  A(tcam_plane, planes, TCAM_MAX_PLANES)                                                                                 \
  F(int64_t, points)  /* in all objects together; -1: a grid, given by size, lo and hi */                                \
  A(int64_t, size, 3) /* H, W, D of the whole grid */                                                                    \
  A(int64_t, lo, 3)   /* the box to decode, in voxels: lo <= index < hi */                                               \
  A(int64_t, hi, 3)                                                                                                      \
  O(int32_t, corners, 0, 0, 1)          /* 1: voxels lie from corner to corner; 0: at centres of cells */                \
  O(int32_t, axes, 3, 2, TCAM_MAX_AXES) /* coordinates per point; 3 for a grid */                                        \
  F(int64_t, extra)                     /* extra features per point or voxel */                                          \
  A(int64_t, width, TCAM_MAX_LAYERS + 1)                                                                                 \
  F(int32_t, layers)                                                                                                     \
  F(int64_t, first_width)                         /* width[1], if no layer above reads the features */                   \
  A(int32_t, skip, TCAM_MAX_LAYERS + 1)           /* of layers 2 to layers-1; 0: the layer does not read the features */ \
  A(tcam_activation, activation, TCAM_MAX_LAYERS) /* of layers 1 to layers-1, from index 0 */                            \
  F(tcam_activation, output_activation)                                                                                  \
  O(int32_t, align_corners, 0, 0, 1)                                                                                     \
  O(int32_t, padding, TCAM_PAD_BORDER, TCAM_PAD_BORDER, TCAM_PAD_REFLECTION)                                             \
  O(double, noise_std, 0, 0, 1e300)         /* standard deviation of the noise (maths/noise.h) added to the combined */  \
                                            /* features of the planes; 0: none */                                        \
  O(uint64_t, noise_seed, 0, 0, UINT64_MAX) /* keys also contain the object, and the voxel in the whole grid or the */   \
                                            /* point in its object (see tcam_inputs) */                                  \
  F(int32_t, dtype) /* of planes, weights, biases, coordinates and their gradients: TCAM_F32 or TCAM_F64 */              \
  O(int32_t, compute, TCAM_F32, TCAM_F32, TCAM_TF32)   /* of products above layer 1 (or also of layer 1: */              \
                                                       /* grid_product.h): as dtype, or with TCAM_F32 TCAM_BF16, */      \
                                                       /* TCAM_F16 or TCAM_TF32 */                                       \
  O(int32_t, out_dtype, TCAM_F32, TCAM_F32, TCAM_BF16) /* of the volume and of its gradient */                           \
  O(int32_t, grad_planes, 0, 0, 1)                     /* backward only: the gradients to compute */                     \
  O(int32_t, grad_decoder, 0, 0, 1)                                                                                      \
  O(int32_t, grad_points, 0, 0, 1)                                                                                       \
  O(int32_t, grad_extra, 0, 0, 1)                                                                                        \
  O(int32_t, threads, 1, 1, 4096)                                                                                        \
  O(int32_t, formulation, TCAM_AUTO, TCAM_AUTO, TCAM_FEATURES) /* of points */                                           \
  O(int32_t, tile, 0, 0, INT32_MAX) /* voxels per tile; 0: the default. Results do not depend on it, except that */      \
                                    /* CUDA gradients do in their last bits. */

#define TCAM_FIELD(type, name) type name;
#define TCAM_ARRAY(type, name, count) type name[count];
#define TCAM_OPTION(type, name, default_value, least, most) type name;
typedef struct {
  TCAM_PROBLEM(TCAM_FIELD, TCAM_ARRAY, TCAM_OPTION)
} tcam_problem;
#undef TCAM_FIELD
#undef TCAM_ARRAY
#undef TCAM_OPTION

// The inputs of a problem: contiguous arrays. Those marked * may be null.
typedef struct {
  const void* const* planes;   // plane_count
  const void* const* weights;  // layers
  const void* const* biases;   // layers, each *
  const double* bounds;        // *(B, 3, 2): the coordinates of the ends of a grid's axes; null: -1 and 1
  const void* points;          // (points, axes) coordinates; null for a grid
  const int64_t* objects;      // *(points): the object of each point; null: points/batch points per object, in order. If it
                               // is given, the noise of a point depends on its number among all points.
  const void* extra;           // (points, extra); (B, voxels of the box, extra) for a grid
} tcam_inputs;

// The arrays for the gradients of a problem. They are overwritten.
typedef struct {
  void* const* planes;
  void* const* weights;
  void* const* biases;  // null entries: no bias
  void *points, *extra;
} tcam_gradients;

// The target and the loss of decode_grid_loss.
typedef struct {
  const void* target;    // (B, C_out, box), contiguous
  int32_t target_dtype;  // floating, or TCAM_U8, which stands for value/255
  int32_t loss;          // an index into the list of maths/loss.h
  double beta;           // of smooth_l1
  int32_t per_object;    // 1: gradients of weights and biases have a leading axis B
} tcam_objective;

// Resampling of (outer, n, inner) along the middle axis, from texels to the voxels [lo, hi) of a grid's axis, or its adjoint.
typedef struct {
  int64_t outer, inner, texels, size, lo, hi;
  int32_t align_corners, padding, corners, adjoint;
  int32_t dtype;  // TCAM_F32 or TCAM_F64
  int32_t threads;
} tcam_resample;

// Standard normals (objects, count) in float32 from a seed and a sequence of maths/noise.h: the noise of a plane's texels.
typedef struct {
  uint64_t seed;
  int64_t objects, count;
  int32_t sequence;
  int32_t threads;
} tcam_normals;

#ifdef __cplusplus
}
#endif
