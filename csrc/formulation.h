// Which of its two formulations decode_points takes, the same on every device.
#pragma once
#include "problem.h"

namespace tcam {

// Whether points gather planes projected through the first layer, in rows of `row_bytes`, rather than the planes: where that
// costs fewer multiply-adds and the projections of `objects` objects do not take too much memory.
inline bool gathers_projections(const tcam_problem& p, int64_t objects, int64_t points, int64_t row_bytes) {
  constexpr double most_bytes = 1 << 30;
  if (!p.layers || p.reduce == TCAM_PRODUCT || p.formulation == TCAM_FEATURES) return false;
  if (p.formulation == TCAM_PROJECTED) return true;
  double texels = 0;
  for (int q = 0; q < p.plane_count; ++q)
    texels += static_cast<double>(p.planes[q].rows) * static_cast<double>(p.planes[q].columns);
  texels *= static_cast<double>(objects);
  if (texels * static_cast<double>(row_bytes) > most_bytes) return false;
  const double n = static_cast<double>(points), c = static_cast<double>(p.channels), n1 = static_cast<double>(p.width[1]);
  const double gathered = 4. * p.plane_count, features = p.reduce == TCAM_SUM ? c : c * p.plane_count;
  return texels * c * n1 + n * gathered * n1 < n * (gathered * c + features * n1);
}

}  // namespace tcam
