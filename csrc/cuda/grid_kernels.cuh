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

// A thread of delta_sums_kernel owns sum_i x sum_k voxels (i, k) and two neighbouring channels. A warp owns sum_channels
// channels of these voxels, and copies sum_group of its i at a time to shared memory. A block owns sum_tile of k.
constexpr int sum_i = 12, sum_k = 4, sum_channels = 64, sum_group = 3, sum_tile = sum_k * warps;
constexpr size_t delta_sums_bytes = warps * sum_i * sum_channels * (2 * sizeof(float) + sum_k * sizeof(uint16_t));

// Channels c and c + 1 of a row of n: read with zeros beyond the row, and written but for what is beyond it. c is even, and the
// row lies at an even number of floats where n is even.
TCAM_DEVICE float2 read_two(const float* row, int c, int n) {
  if (n % 2 == 0 && c < n) return *reinterpret_cast<const float2*>(row + c);
  return {c < n ? row[c] : 0.f, c + 1 < n ? row[c + 1] : 0.f};
}
TCAM_DEVICE void write_two(float* row, int c, int n, float2 v) {
  if (n % 2 == 0 && c < n) {
    *reinterpret_cast<float2*>(row + c) = v;
    return;
  }
  if (c < n) row[c] = v.x;
  if (c + 1 < n) row[c + 1] = v.y;
}

// Adds two neighbouring numbers of format T to each of three sums.
template <class T>
TCAM_DEVICE void add_two(uint32_t two, float (&a)[2], float (&b)[2], float (&g)[2]) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float v = T::widen(static_cast<uint16_t>(two >> (16 * e)));
    a[e] += v, b[e] += v, g[e] += v;
  }
}

// Adds `sums` (warp, i, position) over the warps, ascending. The threads of a block share the calls write(i, position, sum).
template <class Write>
TCAM_DEVICE void add_warps(const float* sums, Write write) {
#pragma unroll
  for (int q = 0; q < sum_i * sum_channels / threads; ++q) {
    const int e = q * threads + threadIdx.x;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += sums[w * sum_i * sum_channels + e];
    write(e / sum_channels, e % sum_channels, sum);
  }
}

// The sums of a slab's delta_1 over its three axes, times *factor (null: 1):
//   delta1 (ni, nj, nk, N): 16-bit numbers of format T, channels in the order of delta1_column;
//   db (nj, nk, n) += the sums over i;
//   partial_a (ni, nj, tiles of k, n) = the sums over the k of a tile; add_axis_sum_kernel adds the tiles to dA;
//   partial_g (ni, parts of j, nk, n) = the sums over the j of a part; likewise for dG.
// Block (x, y) owns tile x / (N / 64) of k, 64 channels, and part y of j. For every sum_i of i in turn, it walks its j. The
// sums over j stay in registers. The sums over i are complete in a thread. The sums over k are added from warp to warp in
// shared memory, in two buffers that take turns. Each number of delta1 is read once: as soon as a warp has used a group of i,
// it starts to copy the same group of the next j to the same place.
template <class T, int N>
__global__ void __launch_bounds__(threads)
    delta_sums_kernel(const uint16_t* __restrict__ delta1, int ni, int nj, int nk, int n, const float* factor, float* db,
                      float* __restrict__ partial_a, float* __restrict__ partial_g) {
  constexpr int spans = N / sum_channels, groups = sum_i / sum_group, last = groups - 1;
  Shared shared;
  float* const all_sums = shared.take<float>(2 * warps * sum_i * sum_channels);  // over k: (step & 1, warp, i, position)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint16_t* const rows = shared.take<uint16_t>(warps * sum_i * sum_k * sum_channels) +
                         warp * sum_i * sum_k * sum_channels;  // the warp's part: (i, k, position)
  const int span = blockIdx.x % spans, tile = blockIdx.x / spans, tiles = gridDim.x / spans;
  const int begin = static_cast<int>(static_cast<int64_t>(nj) * blockIdx.y / gridDim.y);
  const int end = static_cast<int>(static_cast<int64_t>(nj) * (blockIdx.y + 1) / gridDim.y);
  const int k0 = tile * sum_tile + warp * sum_k, c = span * sum_channels + delta1_column(2 * lane);
  const size_t slice = static_cast<size_t>(nj) * nk * N;
  const float f = factor ? *factor : 1.f;
  int step = 0;
  for (int i0 = 0; i0 < ni; i0 += sum_i) {
    float sum_g[sum_i][sum_k][2] = {};
    for (int q = 0; q < sum_i; ++q) reinterpret_cast<uint4*>(rows)[q * 32 + lane] = {0, 0, 0, 0};
    __syncwarp();  // zeros are where no voxel of the volume will be copied
    // Where the lane copies its next 16 bytes from, of voxel k0 + lane / 8.
    const uint16_t* from =
        delta1 + i0 * slice + (static_cast<size_t>(begin) * nk + k0) * N + lane / 8 * N + span * sum_channels + lane % 8 * 8;
    // Starts the copies of a group of i: 0, 1, ..., last of the first j, then of the next j.
    auto copy = [&](int group, bool more) {
#pragma unroll
      for (int i = group * sum_group; i < (group + 1) * sum_group; ++i, from += slice)
        if (more && i0 + i < ni && k0 + lane / 8 < nk) ptx::copy16(rows + (i * 32 + lane) * 8, from);
      ptx::commit_copies();
      if (group == last) from += static_cast<size_t>(nk) * N - sum_i * slice;
    };
#pragma unroll
    for (int g = 0; g < last; ++g) copy(g, true);
    for (int j = begin; j < end; ++j, ++step) {
      float* const db_row = db + (static_cast<size_t>(j) * nk + k0) * n;
      float2 before[sum_k];
#pragma unroll
      for (int k = 0; k < sum_k; ++k)
        if (k0 + k < nk) before[k] = read_two(db_row + k * n, c, n);
      float sum_b[sum_k][2] = {};
      float* const sums = all_sums + (step & 1) * warps * sum_i * sum_channels;
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        ptx::wait_copies<last - 1>();
        __syncwarp();  // the group is there, and the group before has been used
        copy(g ? g - 1 : last, g == 0 || j + 1 < end);
        uint32_t two[sum_group][sum_k];
#pragma unroll
        for (int q = 0; q < sum_group * sum_k; ++q)
          two[q / sum_k][q % sum_k] = reinterpret_cast<const uint32_t*>(rows)[(g * sum_group * sum_k + q) * 32 + lane];
#pragma unroll
        for (int q = 0; q < sum_group; ++q) {
          const int i = g * sum_group + q;
          float sum_a[2] = {};
#pragma unroll
          for (int k = 0; k < sum_k; ++k) add_two<T>(two[q][k], sum_a, sum_b[k], sum_g[i][k]);
          *reinterpret_cast<float2*>(sums + (warp * sum_i + i) * sum_channels + 2 * lane) = {sum_a[0], sum_a[1]};
        }
      }
#pragma unroll
      for (int k = 0; k < sum_k; ++k)
        if (k0 + k < nk) write_two(db_row + k * n, c, n, {before[k].x + sum_b[k][0] * f, before[k].y + sum_b[k][1] * f});
      __syncthreads();  // the sums of this step are written, and those of the step before have been read
      add_warps(sums, [&](int i, int at, float sum) {
        const int channel = span * sum_channels + delta1_column(at);
        if (i0 + i < ni && channel < n)
          partial_a[((static_cast<size_t>(i0 + i) * nj + j) * tiles + tile) * n + channel] = sum * f;
      });
    }
#pragma unroll
    for (int i = 0; i < sum_i; ++i)
#pragma unroll
      for (int k = 0; k < sum_k; ++k)
        if (i0 + i < ni && k0 + k < nk)
          write_two(partial_g + ((static_cast<size_t>(i0 + i) * gridDim.y + blockIdx.y) * nk + k0 + k) * n, c, n,
                    {sum_g[i][k][0] * f, sum_g[i][k][1] * f});
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
