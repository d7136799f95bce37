// A box of voxels cut into regions, which are processed one after another on the stream and share a workspace.
#pragma once
#include "device.cuh"

namespace tcam {

// A region: ni x nj x nk voxels from (i0, j0, k0) of a box on. Voxel numbers v count with k fastest; i(v), j(v), k(v) are the
// voxel's indices in the box and in_box(v) its number there.
struct Region {
  int64_t i0, j0, k0;
  int ni, nj, nk;
  int64_t box[3];
  TCAM_HD int voxels() const { return ni * nj * nk; }
  TCAM_HD int64_t i(int v) const { return i0 + v / (nj * nk); }
  TCAM_HD int64_t j(int v) const { return j0 + v / nk % nj; }
  TCAM_HD int64_t k(int v) const { return k0 + v % nk; }
  TCAM_HD int64_t in_box(int v) const { return (i(v) * box[1] + j(v)) * box[2] + k(v); }
};

struct Regions {
  int64_t box[3], size[3];  // voxels along i, j, k of the box and of a region; the last region along an axis may be shorter

  // Regions of at most `voxels` voxels: part of a row of k, or whole rows of a patch of i and j that is about square. So sums
  // over any axis have several terms, and neighbouring voxels read the same texels.
  static Regions of(const int64_t* box, int64_t voxels) {
    auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    Regions r = {{box[0], box[1], box[2]}, {1, 1, least(box[2], voxels)}};
    const int64_t rows = voxels / r.size[2];
    while (r.size[0] * 2 <= box[0] && r.size[0] * r.size[0] * 4 <= rows) r.size[0] *= 2;
    r.size[1] = least(box[1], rows / r.size[0]);
    r.size[0] = least(box[0], rows / r.size[1]);
    return r;
  }
  int64_t most() const { return size[0] * size[1] * size[2]; }  // voxels of the largest region

  template <class F>
  void each(F f) const {
    auto extent = [&](int a, int64_t at) { return static_cast<int>(box[a] - at < size[a] ? box[a] - at : size[a]); };
    for (int64_t i = 0; i < box[0]; i += size[0])
      for (int64_t j = 0; j < box[1]; j += size[1])
        for (int64_t k = 0; k < box[2]; k += size[2])
          f(Region{i, j, k, extent(0, i), extent(1, j), extent(2, k), {box[0], box[1], box[2]}});
  }
};

}  // namespace tcam
