// A tiled matrix product C = A B, used for every product outside the fused kernels. Functors read A and B and store C, so that
// activations, transposes and partial sums need no pass of their own.
#pragma once
#include "gemm_tile.cuh"

namespace tcam {

// One operand's panel for the block's step: `lines` rows of A or columns of B by `depth` of k. fetch() reads the numbers of a
// step from memory to registers; put() turns them into elements and writes them to shared memory. They are separate because the
// loads of the next step are issued before the products of this one, and their values are needed only after. A thread reads
// groups of numbers that are neighbours in memory: along k in a `deep` operand, else along the lines.
template <class Tile, int lines, bool deep, class Operand>
struct PanelReader {
  using Real = typename Tile::Real;
  using Panel = typename Tile::template Panel<lines, deep>;
  static constexpr int group = 16 / sizeof(Real), across = (deep ? Tile::depth : lines) / group;  // groups from row to row
  static constexpr int groups = lines * Tile::depth / group, own = (groups + gemm_threads - 1) / gemm_threads;
  static constexpr bool all_busy = groups % gemm_threads == 0;

  const Operand& operand;
  const bool vectors;    // whether a group is 16 aligned bytes
  const int64_t line0;   // the panel's first line
  const int lines_left;  // lines from there on that exist
  Real next[own][group];

  TCAM_DEVICE static int number(int u) { return threadIdx.x + u * gemm_threads; }
  TCAM_DEVICE static int line(int e) { return deep ? e / across : e % across * group; }
  TCAM_DEVICE static int k(int e) { return deep ? e % across * group : e / across; }

  TCAM_DEVICE PanelReader(const Operand& from, bool by_vectors, int64_t first, int64_t count)
      : operand(from),
        vectors(by_vectors),
        line0(first),
        lines_left(static_cast<int>(count - first < lines ? count - first : lines)) {}

  // Reads the panel of [k0, k0 + k_left). What lies beyond the end of the matrix is replaced by what does not.
  TCAM_DEVICE void fetch(int64_t k0, int k_left) {
#pragma unroll
    for (int u = 0; u < own; ++u) {
      const int e = number(u), l = line(e) < lines_left ? line(e) : 0, q = k(e) < k_left ? k(e) : 0;
      const Real* const from =
          operand.data + (deep ? (line0 + l) * operand.pitch + k0 + q : (k0 + q) * operand.pitch + line0 + l);
      if (!all_busy && e >= groups) continue;
      if (vectors) {
        load_vector(next[u], from);
      } else {
        const int most = (deep ? k_left - q : lines_left - l) - 1;
#pragma unroll
        for (int i = 0; i < group; ++i) next[u][i] = from[i < most ? i : most];
      }
    }
  }

  // Writes the elements to `panel`, with zeros beyond the end of the matrix, and adds them over k to line_sum.
  TCAM_DEVICE void put(typename Tile::Number* panel, int k_left, Real (&line_sum)[group]) {
#pragma unroll
    for (int u = 0; u < own; ++u) {
      const int e = number(u), l = line(e), q = k(e);
      if (!all_busy && e >= groups) continue;
      operand.values(next[u]);
      typename Tile::Number to[group];
#pragma unroll
      for (int i = 0; i < group; ++i) {
        const bool inside = deep ? l < lines_left && q + i < k_left : l + i < lines_left && q < k_left;
        const Real x = inside ? next[u][i] : Real(0);
        line_sum[i] += x;
        to[i] = Tile::number(x);
      }
      typename Tile::Number* const at = panel + l * Panel::line_step + q * Panel::k_step;
      if ((deep ? Panel::k_step : Panel::line_step) == 1) {
        store_vector(at, to);
      } else {
#pragma unroll
        for (int i = 0; i < group; ++i) at[i * (deep ? Panel::k_step : Panel::line_step)] = to[i];
      }
    }
  }
};

// store(...) of the neighbours sum[0, count) of row r from column c on; `left` of them exist.
template <class Real, int count, class Store>
TCAM_DEVICE void store_group(const Store& store, bool vectors, int split, int64_t r, int c, int left,
                             const Real (&sum)[count]) {
  if (vectors && left >= count) {
    Real read[count] = {}, out[count];
    if (const Real* from = store.reads(split, r, c)) load_vector(read, from);
#pragma unroll
    for (int i = 0; i < count; ++i) out[i] = store.value(sum[i], read[i]);
    store_vector(store.at(split, r, c), out);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i >= left) continue;
      const Real* from = store.reads(split, r, c + i);
      *store.at(split, r, c + i) = store.value(sum[i], from ? *from : Real(0));
    }
  }
}

// Whether the kernel may move 16 bytes at once to and from A, B and C; see can_use_vectors of the functors.
struct Vectors {
  bool a, b, c;
};

// C (m, n) = A (m, k) B (k, n). Grid: (row tiles, column tiles, splits); a block owns a tile of C and the range
// [split * k_chunk, (split + 1) * k_chunk) of k, which it adds in ascending steps of `depth`. Two panels of each operand are in
// shared memory: a step reads one while the next step's is written.
template <class Tile, class A, class B, class Store>
__global__ void __launch_bounds__(gemm_threads, Tile::blocks)
    gemm_kernel(int64_t m, int n, int64_t k, int64_t k_chunk, Vectors vectors, A a, B b, Store store) {
  using Real = typename Tile::Real;
  using Number = typename Tile::Number;
  using ReaderA = PanelReader<Tile, Tile::rows, A::columns_adjacent, A>;
  using ReaderB = PanelReader<Tile, Tile::columns, !B::columns_adjacent, B>;
  using PanelA = typename ReaderA::Panel;
  using PanelB = typename ReaderB::Panel;
  constexpr int depth = Tile::depth, group = ReaderA::group;
  Shared shared;
  Number* const a_panels = shared.take<Number>(2 * PanelA::size);
  Number* const b_panels = shared.take<Number>(2 * PanelB::size);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Tile::rows, begin = blockIdx.z * k_chunk;
  const int column0 = blockIdx.y * Tile::columns;
  const int64_t end = begin + k_chunk < k ? begin + k_chunk : k;
  auto left = [&](int64_t k0) { return static_cast<int>(end - k0 < depth ? end - k0 : depth); };

  ReaderA a_reader(a, vectors.a, row0, m);
  ReaderB b_reader(b, vectors.b, column0, n);
  Real a_sum[group] = {}, b_sum[group] = {};  // over the thread's elements; b_sum is not used
  a_reader.fetch(begin, left(begin));
  b_reader.fetch(begin, left(begin));
  a_reader.put(a_panels, left(begin), a_sum);
  b_reader.put(b_panels, left(begin), b_sum);
  __syncthreads();
  Tile tile;
  int now = 0;
  for (int64_t k0 = begin + depth; k0 < end; k0 += depth, now ^= 1) {
    a_reader.fetch(k0, left(k0));
    b_reader.fetch(k0, left(k0));
    tile.template add<PanelA, PanelB>(a_panels + now * PanelA::size, b_panels + now * PanelB::size);
    a_reader.put(a_panels + (now ^ 1) * PanelA::size, left(k0), a_sum);
    b_reader.put(b_panels + (now ^ 1) * PanelB::size, left(k0), b_sum);
    __syncthreads();
  }
  tile.template add<PanelA, PanelB>(a_panels + now * PanelA::size, b_panels + now * PanelB::size);
  tile.each([&](int r, int c, const auto& sum) {
    if (row0 + r < m) store_group<Real>(store, vectors.c, blockIdx.z, row0 + r, column0 + c, n - column0 - c, sum);
  });

  if constexpr (Store::sums_rows) {  // of A: thread t has summed a group of rows over every (threads / across)th k
    static_assert(!A::columns_adjacent && gemm_threads % ReaderA::across == 0, "a thread's groups have the same rows");
    if (blockIdx.y || !store.row_sums) return;
    Real* const all = shared.take<Real>(gemm_threads * group);
    store_vector(all + threadIdx.x * group, a_sum);
    __syncthreads();
    const int r = threadIdx.x;
    if (r >= Tile::rows || row0 + r >= m) return;
    Real sum = 0;
    for (int t = r / group; t < gemm_threads; t += ReaderA::across) sum += all[t * group + r % group];
    store.row_sums[blockIdx.z * m + row0 + r] += sum;
  }
}

// Launches gemm_kernel. k_chunk 0: a single split over all of k.
template <class Tile, class A, class B, class Store>
cudaError_t gemm(int64_t m, int n, int64_t k, int64_t k_chunk, A a, B b, Store store, cudaStream_t stream) {
  using Real = typename Tile::Real;
  constexpr int group = 16 / sizeof(Real);
  if (k_chunk <= 0 || k_chunk > k) k_chunk = k;
  const dim3 grid(static_cast<unsigned>((m + Tile::rows - 1) / Tile::rows),
                  static_cast<unsigned>((n + Tile::columns - 1) / Tile::columns),
                  static_cast<unsigned>((k + k_chunk - 1) / k_chunk));
  const bool chunks = k_chunk == k || k_chunk % group == 0;  // whether a split begins with a group
  const Vectors vectors = {on_vectors(a.data, a.pitch) && (chunks || !A::columns_adjacent),
                           on_vectors(b.data, b.pitch) && (chunks || B::columns_adjacent), store.can_use_vectors()};
  constexpr size_t panels = Tile::template Panel<Tile::rows, A::columns_adjacent>::size +
                            Tile::template Panel<Tile::columns, !B::columns_adjacent>::size;
  constexpr size_t bytes = 2 * panels * sizeof(typename Tile::Number) + (Store::sums_rows ? gemm_threads * 16 : 0) + 64;
  return launch(gemm_kernel<Tile, A, B, Store>, grid, gemm_threads, bytes, stream, m, n, k, k_chunk, vectors, a, b, store);
}

// ---- operands and results ---------------------------------------------------------------------

// Operands: a row-major matrix with `pitch` numbers from row to row (Rows), and the transpose of such a matrix (Transposed).
// columns_adjacent: whether neighbours in memory differ in the column. values(x) turns numbers read into elements.
template <class Real>
struct Rows {
  static constexpr bool columns_adjacent = true;
  const Real* data;
  int64_t pitch;
  template <int count>
  TCAM_DEVICE void values(Real (&)[count]) const {}
};
template <class Real>
struct Transposed {
  static constexpr bool columns_adjacent = false;
  const Real* data;
  int64_t pitch;
  template <int count>
  TCAM_DEVICE void values(Real (&)[count]) const {}
};

// Stores: *at(split, r, c) = value(sum, *reads(split, r, c)), where reads may return null for 0. sums_rows: whether the sums of
// the rows of A over a split's k are stored too. can_use_vectors: whether neighbours in a row of C are neighbours in memory, at
// aligned addresses.
//
// out[r, c] = sum + bias[c].
template <class Real>
struct WriteRows {
  static constexpr bool sums_rows = false;
  Real* out;
  int64_t pitch;
  const Real* bias;  // null: none
  bool can_use_vectors() const { return on_vectors(out, pitch) && on_vectors(bias, 0); }
  TCAM_DEVICE Real* at(int, int64_t r, int c) const { return out + r * pitch + c; }
  TCAM_DEVICE const Real* reads(int, int64_t, int c) const { return bias ? bias + c : nullptr; }
  TCAM_DEVICE Real value(Real sum, Real read) const { return sum + read; }
};
// out[r, c] += sum.
template <class Real>
struct AddRows {
  static constexpr bool sums_rows = false;
  Real* out;
  int64_t pitch;
  bool can_use_vectors() const { return on_vectors(out, pitch); }
  TCAM_DEVICE Real* at(int, int64_t r, int c) const { return out + r * pitch + c; }
  TCAM_DEVICE const Real* reads(int split, int64_t r, int c) const { return at(split, r, c); }
  TCAM_DEVICE Real value(Real sum, Real read) const { return sum + read; }
};
// out[c, r] = sum.
template <class Real>
struct WriteTransposed {
  static constexpr bool sums_rows = false;
  Real* out;
  int64_t pitch;
  bool can_use_vectors() const { return false; }
  TCAM_DEVICE Real* at(int, int64_t r, int c) const { return out + c * pitch + r; }
  TCAM_DEVICE const Real* reads(int, int64_t, int) const { return nullptr; }
  TCAM_DEVICE Real value(Real sum, Real) const { return sum; }
};
// partials[split, r, c] += sum, and row_sums[split, r] += the sum of A's row r: the one store that takes more than one split.
template <class Real>
struct AddPartial {
  static constexpr bool sums_rows = true;
  Real* partials;  // (splits, rows, columns)
  int64_t rows, columns;
  Real* row_sums;  // (splits, rows); null: not wanted
  bool can_use_vectors() const { return on_vectors(partials, columns); }
  TCAM_DEVICE Real* at(int split, int64_t r, int c) const { return partials + (split * rows + r) * columns + c; }
  TCAM_DEVICE const Real* reads(int split, int64_t r, int c) const { return at(split, r, c); }
  TCAM_DEVICE Real value(Real sum, Real read) const { return sum + read; }
};

}  // namespace tcam
