// A box of voxels, cut into regions that follow each other on the stream.
#pragma once
#include "device.cuh"

namespace tcam {

// Part of a box; its voxel v is (i, j, k), k fastest.
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
  int64_t box[3], size[3];  // size: of all but the last along an axis

  // Whole rows and slices, as many as the voxels allow.
  static Regions of(const int64_t* box, int64_t voxels) {
    Regions r = {{box[0], box[1], box[2]}, {}};
    for (int a = 2; a >= 0; --a) {
      r.size[a] = box[a] < voxels ? box[a] : voxels;
      voxels = voxels / r.size[a] > 1 ? voxels / r.size[a] : 1;
    }
    return r;
  }
  int64_t most() const { return size[0] * size[1] * size[2]; }

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
