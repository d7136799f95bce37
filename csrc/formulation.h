// The choices of how a problem is computed, the same on every device unless they say that they are for CPUs.
#pragma once
#include "problem.h"

namespace tcam {

struct PlaneRange {  // begin <= plane < end
  int begin, end;
  int count() const { return end - begin; }
};
inline PlaneRange planes_of_group(const tcam_problem& p, int group) {
  PlaneRange r = {0, 0};
  while (p.planes[r.begin].group < group) ++r.begin;
  for (r.end = r.begin; r.end < p.plane_count && p.planes[r.end].group == group;) ++r.end;
  return r;
}
// The factor on every sample of a plane.
inline double plane_scale(const tcam_problem& p, int plane) {
  return p.reduce == TCAM_MEAN ? 1. / planes_of_group(p, p.planes[plane].group).count() : 1.;
}
// Points sample planes into matrices: one for each group, or where planes are multiplied one for each plane.
inline int matrix_count(const tcam_problem& p) { return p.reduce == TCAM_PRODUCT ? p.plane_count : p.group_count; }
inline int matrix_of(const tcam_problem& p, int plane) { return p.reduce == TCAM_PRODUCT ? plane : p.planes[plane].group; }
inline PlaneRange planes_of_matrix(const tcam_problem& p, int matrix) {
  return p.reduce == TCAM_PRODUCT ? PlaneRange{matrix, matrix + 1} : planes_of_group(p, matrix);
}

// The reason why a grid does not separate into maps over pairs of axes and is decoded point by point; null: it separates.
inline const char* not_separable(const tcam_problem& p) {
  if (p.reduce == TCAM_PRODUCT) return "planes are multiplied";
  if (p.extra > 0) return "voxels have extra features";
  if (p.noise_std != 0) return "every voxel has its own noise";
  return nullptr;
}
inline bool walks_points(const tcam_problem& p) { return p.points >= 0 || not_separable(p); }

// Whether a CPU decodes a grid whose planes are multiplied through maps of sampled features, which the voxel loop multiplies;
// `why`: the reason why it does not.
inline bool multiplies_maps(const tcam_problem& p, const char** why = nullptr) {
  if (p.points >= 0 || p.reduce != TCAM_PRODUCT) return false;
  const char* reason = nullptr;
  if (!p.layers) reason = "there are no layers";
  if (p.extra > 0) reason = "voxels have extra features";
  if (p.noise_std != 0) reason = "every voxel has its own noise";
  if (p.layers && p.first_width != p.width[1]) reason = "layers above the first read the features";
  if (p.group_count * p.channels > TCAM_MAX_WIDTH) reason = "the products have more than 512 features";
  if (why) *why = reason;
  return !reason;
}
// Numbers of a row of a grid's maps on a CPU: of z_1, or where the maps are multiplied, of the features.
inline int64_t map_width(const tcam_problem& p) { return multiplies_maps(p) ? p.group_count * p.channels : p.first_width; }
// Whether a plane of a grid is sampled on a CPU before its samples are multiplied by W_1, instead of projected first: if that
// takes less time. The voxels of the whole grid count, so that all of its boxes are computed alike.
inline bool samples_first(const tcam_problem& p, int plane) {
  const tcam_plane& q = p.planes[plane];
  const double texels = static_cast<double>(q.rows) * static_cast<double>(q.columns);
  const double rows = static_cast<double>(p.size[q.row_axis]) * static_cast<double>(p.size[q.column_axis]);
  const double c = static_cast<double>(p.channels), n1 = static_cast<double>(p.first_width);
  constexpr double sample = 24, spread = 4;  // multiply-adds in the time of a sampled feature, of a sampled projection
  return rows * (sample * c + c * n1) < texels * c * n1 + rows * spread * n1;
}

// Whether decode_loss computes gradients and needs the workspace of backward.
inline bool loss_wants_gradients(const tcam_problem& p) { return p.grad_planes || p.grad_decoder || p.grad_extra; }

// Whether points gather rows of `row_bytes` of planes projected through the first layer, instead of the planes' features: if
// that takes fewer multiply-adds and the projections of `objects` objects fit in memory. For a grid the voxels of the whole
// grid count, so that all of its boxes are computed alike. Noise of the features needs the product with W_1 in any case.
inline bool gathers_projections(const tcam_problem& p, int64_t objects, int64_t row_bytes) {
  constexpr double most_bytes = 1 << 30;
  if (!p.layers || p.reduce == TCAM_PRODUCT || p.noise_std != 0 || p.formulation == TCAM_FEATURES) return false;
  if (p.formulation == TCAM_PROJECTED) return true;
  double texels = 0;
  for (int q = 0; q < p.plane_count; ++q)
    texels += static_cast<double>(p.planes[q].rows) * static_cast<double>(p.planes[q].columns);
  texels *= static_cast<double>(objects);
  if (texels * static_cast<double>(row_bytes) > most_bytes) return false;
  double n = static_cast<double>(p.points);
  if (p.points < 0) n = static_cast<double>(p.size[0]) * static_cast<double>(p.size[1]) * static_cast<double>(p.size[2]);
  const double c = static_cast<double>(p.channels), n1 = static_cast<double>(p.first_width);
  const double gathered = 4. * p.plane_count, features = c * p.group_count;
  return texels * c * n1 + n * gathered * n1 < n * (gathered * c + features * n1);
}

}  // namespace tcam
