// The kernels of grid.cuh: from projected planes to z_1 or its maps, and from delta_1 back to texels.
#pragma once
#include "fused_tile.cuh"
#include "region.cuh"
#include "sums.cuh"

namespace tcam {

// ---- the axes ----------------------------------------------------------------------------

// A voxel's two texels along an axis of a plane, with their weights.
template <class Real>
struct VoxelTap {
  int lo, hi;
  Real w_lo, w_hi;
};

// out[x] = the tap of voxel first + x of the `size` voxels of an axis, its weights times `scale`; see voxel_tap. out: (count).
// bounds: the two coordinates that the voxels' axis runs from and to; null: -1 and 1. A thread owns a voxel.
template <class Real>
__global__ void taps_kernel(int64_t first, int64_t count, int64_t size, Axis axis, bool corners, const double* bounds,
                            double scale, VoxelTap<Real>* out) {
  for (int64_t x = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; x < count;
       x += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const Tap<double> t = voxel_tap(axis, first + x, size, corners, bounds);
    out[x] = {t.lo, t.hi, static_cast<Real>(t.w_lo * scale), static_cast<Real>(t.w_hi * scale)};
  }
}

// Projected planes to be summed: plane e is (rows, columns, n), with columns[e] columns. rows_at[e] and columns_at[e] are the
// taps, on its rows and columns, of the voxels along row_axis[e] and column_axis[e].
template <class Real>
struct PlaneList {
  int count;
  const Real* plane[TCAM_MAX_PLANES];
  int columns[TCAM_MAX_PLANES];
  int row_axis[TCAM_MAX_PLANES], column_axis[TCAM_MAX_PLANES];
  const VoxelTap<Real>*rows_at[TCAM_MAX_PLANES], *columns_at[TCAM_MAX_PLANES];
};

// Adds to sum channels [c, c + group) of a plane (rows, columns, n), interpolated between the rows of tap t and the columns of
// tap u. With a group above 1, c, n and the plane allow vector loads.
template <class Real, int group>
TCAM_DEVICE void add_bilinear(const Real* plane, int columns, int n, int c, const VoxelTap<Real>& t, const VoxelTap<Real>& u,
                              Real (&sum)[group]) {
  const Real* lo = plane + static_cast<int64_t>(t.lo) * columns * n + c;
  const Real* hi = plane + static_cast<int64_t>(t.hi) * columns * n + c;
  const int64_t a = static_cast<int64_t>(u.lo) * n, b = static_cast<int64_t>(u.hi) * n;
  Real lo_a[group], lo_b[group], hi_a[group], hi_b[group];
  load_vector(lo_a, lo + a), load_vector(lo_b, lo + b), load_vector(hi_a, hi + a), load_vector(hi_b, hi + b);
#pragma unroll
  for (int i = 0; i < group; ++i)
    sum[i] += t.w_lo * (u.w_lo * lo_a[i] + u.w_hi * lo_b[i]) + t.w_hi * (u.w_lo * hi_a[i] + u.w_hi * hi_b[i]);
}

// ---- the first layer -----------------------------------------------------------------------

template <class Real>
struct Sampled {
  PlaneList<Real> planes;
  const Real* bias;  // null: none
  int n;
};

constexpr int first_layer_run = 8;  // neighbouring voxels that a warp takes at a time: they share texels

// z[v, :] = bias + sum over the planes of their samples at the region's voxel v. z: (voxels of the region, n). A warp owns a
// run of voxels, a lane every 32nd group of channels. The planes are summed in the order of the list.
template <class Real, int group>
__global__ void __launch_bounds__(threads) first_layer_kernel(Sampled<Real> s, Region region, Real* z) {
  const PlaneList<Real>& p = s.planes;
  const int voxels = region.voxels();
  for (int run = (blockIdx.x * warps + threadIdx.x / 32) * first_layer_run; run < voxels;
       run += gridDim.x * warps * first_layer_run)
    for (int v = run; v < run + first_layer_run && v < voxels; ++v) {
      const int64_t i = region.i(v), j = region.j(v), k = region.k(v);
      auto along = [&](int axis) { return axis == 0 ? i : axis == 1 ? j : k; };
      for (int c = threadIdx.x % 32 * group; c < s.n; c += 32 * group) {
        Real sum[group];
#pragma unroll
        for (int e = 0; e < group; ++e) sum[e] = s.bias ? s.bias[c + e] : Real(0);
        for (int q = 0; q < p.count; ++q)
          add_bilinear(p.plane[q], p.columns[q], s.n, c, p.rows_at[q][along(p.row_axis[q])],
                       p.columns_at[q][along(p.column_axis[q])], sum);
        store_vector(z + static_cast<int64_t>(v) * s.n + c, sum);
      }
    }
}

// map[x, y, :] = bias (null: 0) + sum over the planes of their samples at voxels x0 + x of the map's first axis and y of its
// second, rounded to T. map: (nx, ny, padded), zero in channels n to padded. A warp owns a pair (x, y), a lane every 32nd
// channel.
template <class T>
__global__ void __launch_bounds__(threads) map_kernel(PlaneList<float> planes, int n, int padded, int64_t x0, int64_t nx,
                                                      int64_t ny, const float* bias, uint16_t* map) {
  const int lane = threadIdx.x % 32;
  for (int64_t v = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / 32; v < nx * ny;
       v += static_cast<int64_t>(gridDim.x) * warps) {
    for (int c = lane; c < padded; c += 32) {
      float sum[1] = {bias && c < n ? bias[c] : 0.f};
      for (int q = 0; q < planes.count && c < n; ++q)
        add_bilinear(planes.plane[q], planes.columns[q], n, c, planes.rows_at[q][x0 + v / ny], planes.columns_at[q][v % ny],
                     sum);
      map[v * padded + c] = T::round(sum[0]);
    }
  }
}

// ---- from delta_1 to the maps -----------------------------------------------------------------

constexpr int sum_tile = 16;  // voxels of j and of k that a block of delta_sums_kernel owns

// The sums of a slab's delta_1 over its three axes, times *factor (null: 1):
//   delta1 (ni, nj, nk, N): 16-bit numbers of format T, channels in the order of delta1_column;
//   db (nj, nk, n) += the sums over i;
//   partial_a (ni, nj, tiles of k, n) = the sums over the k of a tile; add_axis_sum_kernel adds the tiles to dA;
//   partial_g (ni, tiles of j, nk, n) = the sums over the j of a tile; likewise for dG.
// A block owns a tile of sum_tile x sum_tile voxels (j, k) and walks i in ascending order. A thread owns 8 channels. It adds
// half of the tile's j at one k for g and b, then half of the tile's k at one j for a. The thread of the lower half adds the
// upper half's sum, which it reads from shared memory. Loads carry no bounds check (indices are clamped), so that all eight of
// a thread are in flight at once.
template <class T, int N>
__global__ void __launch_bounds__(sum_tile* N / 4)
    delta_sums_kernel(const uint16_t* __restrict__ delta1, int ni, int nj, int nk, int n, const float* factor,
                      float* __restrict__ db, float* __restrict__ partial_a, float* __restrict__ partial_g) {
  constexpr int lanes = N / 8, half = sum_tile / 2;
  Shared shared;
  float* other = shared.take<float>(2 * 2 * sum_tile * N);  // upper halves' sums: (i & 1, g and a, line, channel)
  const int at = threadIdx.x % lanes * 8, line = threadIdx.x / lanes % sum_tile, upper = threadIdx.x / (lanes * sum_tile);
  const int tk = blockIdx.x, tj = blockIdx.y, tiles_k = gridDim.x, tiles_j = gridDim.y;
  const int j0 = tj * sum_tile, k0 = tk * sum_tile;
  const float f = factor ? *factor : 1.f;
  float sum_b[half][8] = {};
  // Calls use(q, delta_1 of 8 channels) for the `half` voxels (j + q dj, k + q dk), with zeros beyond the volume.
  auto each = [&](int i, int j, int k, int dj, int dk, auto use) {
    uint4 raw[half];
#pragma unroll
    for (int q = 0; q < half; ++q) {
      const int jq = j + q * dj, kq = k + q * dk;
      const size_t voxel = (static_cast<size_t>(i) * nj + (jq < nj ? jq : nj - 1)) * nk + (kq < nk ? kq : nk - 1);
      raw[q] = *reinterpret_cast<const uint4*>(delta1 + voxel * N + at);
    }
#pragma unroll
    for (int q = 0; q < half; ++q) {
      const bool inside = j + q * dj < nj && k + q * dk < nk;
      const uint32_t all[4] = {raw[q].x, raw[q].y, raw[q].z, raw[q].w};
      float v[8];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        v[2 * c] = inside ? T::widen(static_cast<uint16_t>(all[c])) : 0.f;
        v[2 * c + 1] = inside ? T::widen(static_cast<uint16_t>(all[c] >> 16)) : 0.f;
      }
      use(q, v);
    }
  };
  for (int i = 0; i < ni; ++i) {
    float sum_g[8] = {}, sum_a[8] = {};
    each(i, j0 + upper * half, k0 + line, 1, 0, [&](int q, const float (&v)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sum_b[q][c] += v[c], sum_g[c] += v[c];
    });
    each(i, j0 + line, k0 + upper * half, 0, 1, [&](int, const float (&v)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sum_a[c] += v[c];
    });
    float* const g_other = other + ((i & 1) * 2 * sum_tile + line) * N + at;
    float* const a_other = g_other + sum_tile * N;
    if (upper)
#pragma unroll
      for (int c = 0; c < 8; ++c) g_other[c] = sum_g[c], a_other[c] = sum_a[c];
    __syncthreads();  // the halves of i are written, and those of i - 1 have been read
    if (upper) continue;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int channel = delta1_column(at + c);
      if (channel < n && k0 + line < nk)
        partial_g[((static_cast<size_t>(i) * tiles_j + tj) * nk + k0 + line) * n + channel] = (sum_g[c] + g_other[c]) * f;
      if (channel < n && j0 + line < nj)
        partial_a[((static_cast<size_t>(i) * nj + j0 + line) * tiles_k + tk) * n + channel] = (sum_a[c] + a_other[c]) * f;
    }
  }
#pragma unroll
  for (int q = 0; q < half; ++q) {
    const int j = j0 + upper * half + q;
    if (j >= nj || k0 + line >= nk) continue;
    float* const to = db + (static_cast<size_t>(j) * nk + k0 + line) * n;
    float before[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) before[c] = to[delta1_column(at + c) < n ? delta1_column(at + c) : 0];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (delta1_column(at + c) < n) to[delta1_column(at + c)] = before[c] + sum_b[q][c] * f;
  }
}

// ---- from the maps to texels -------------------------------------------------------------------

// The index of the first tap with taps[x].lo >= texel, where lo ascends; count if there is none.
template <class Real>
TCAM_DEVICE int64_t first_tap(const VoxelTap<Real>* taps, int64_t count, int texel) {
  int64_t lo = 0, hi = count;
  while (lo < hi) {
    const int64_t middle = (lo + hi) / 2;
    if (taps[middle].lo < texel)
      lo = middle + 1;
    else
      hi = middle;
  }
  return lo;
}

// The adjoint of linear interpolation along one axis, as a gather: out[r, y, :] = sum over voxels x of w(x, r) in[x, y, :], x
// ascending, with w(x, r) the weight of texel r in tap x.
//   in: row x*x_step + y*y_step of n channels, x < count, y < ny; out: row r*r_step + y*y_out, r < texels.
// The voxels that read a texel are neighbours where the taps ascend; where they do not, every voxel is tested. A block owns a
// pair (r, y), a thread some of its channels.
template <class Real>
__global__ void gather_axis_kernel(const Real* in, const VoxelTap<Real>* taps, bool ascending, int64_t count, int n, int texels,
                                   int64_t ny, int64_t x_step, int64_t y_step, Real* out, int64_t r_step, int64_t y_out) {
  for (int64_t b = blockIdx.x; b < texels * ny; b += gridDim.x) {
    const int r = static_cast<int>(b / ny);
    const int64_t y = b % ny, begin = ascending ? first_tap(taps, count, r - 1) : 0,
                  end = ascending ? first_tap(taps, count, r + 1) : count;
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      Real sum = 0;
      for (int64_t x = begin; x < end; ++x) {
        const VoxelTap<Real> t = taps[x];
        if (t.lo != r && t.hi != r) continue;
        const Real w = (t.lo == r ? t.w_lo : Real(0)) + (t.hi == r ? t.w_hi : Real(0));
        sum += w * in[(x * x_step + y * y_step) * n + c];
      }
      out[(r * r_step + y * y_out) * n + c] = sum;
    }
  }
}

}  // namespace tcam
