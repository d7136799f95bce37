// A tiled matrix product C = A B, used for every product outside the fused kernels. Functors read A and B and store C, so that
// activations, transposes and partial sums need no pass of their own.
#pragma once
#include "gemm_tile.cuh"

namespace tcam {

// One operand's panel for the block's step: `lines` rows of A or columns of B by `depth` of k. fetch() reads the numbers of a
// step from memory to registers; put() turns them into elements and writes them to shared memory. They are separate because the
// loads of the next step are issued before the products of this one, and their values are needed only after. A thread reads
// groups of numbers that are neighbours in memory: along k in a `deep` operand, else along the lines. Lines beyond the end of
// the matrix repeat others: they add to sums that are not stored.
template <class Tile, int lines, bool deep, class Operand>
struct PanelReader {
  using Real = typename Tile::Real;
  using Number = typename Tile::Number;
  using Panel = typename Tile::template Panel<lines, deep>;
  static constexpr int group = 16 / sizeof(Real), across = (deep ? Tile::depth : lines) / group;  // groups from row to row
  static constexpr int groups = lines * Tile::depth / group, own = (groups + gemm_threads - 1) / gemm_threads;
  static constexpr int group_step = deep ? Panel::k_step : Panel::line_step;  // within a group in the panel

  const Operand& operand;
  const bool vectors;     // whether a group is 16 aligned bytes
  const Real* from[own];  // the groups of the next step
  int64_t k_pitch;        // numbers from k to k + 1
  int lines_left;         // lines of the panel that exist
  Real next[own][group];

  TCAM_DEVICE static int number(int u) { return threadIdx.x + u * gemm_threads; }
  TCAM_DEVICE static bool exists(int u) { return groups % gemm_threads == 0 || number(u) < groups; }
  TCAM_DEVICE static int line(int u) { return deep ? number(u) / across : number(u) % across * group; }
  TCAM_DEVICE static int k(int u) { return deep ? number(u) % across * group : number(u) / across; }
  TCAM_DEVICE static Number* place(Number* panel, int u) { return panel + line(u) * Panel::line_step + k(u) * Panel::k_step; }

  TCAM_DEVICE PanelReader(const Operand& reads, bool by_vectors, int64_t line0, int64_t count, int64_t k0)
      : operand(reads), vectors(by_vectors), k_pitch(deep ? 1 : reads.pitch) {
    lines_left = static_cast<int>(count - line0 < lines ? count - line0 : lines);
#pragma unroll
    for (int u = 0; u < own; ++u)
      from[u] =
          operand.data + (line0 + (line(u) < lines_left ? line(u) : 0)) * (deep ? operand.pitch : 1) + (k0 + k(u)) * k_pitch;
  }

  // Reads a step of which the first `k_left` of k exist; what does not exist is replaced by what does.
  TCAM_DEVICE void fetch(int k_left) {
#pragma unroll
    for (int u = 0; u < own; ++u) {
      if (!exists(u)) continue;
      const Real* at = from[u];
      from[u] += Tile::depth * k_pitch;
      if (k(u) >= k_left) at -= k(u) * k_pitch;
      if (Tile::large || vectors) {
        load_vector(next[u], at);
      } else {
        const int most = (deep ? k_left - (k(u) < k_left ? k(u) : 0) : lines_left - (line(u) < lines_left ? line(u) : 0)) - 1;
#pragma unroll
        for (int i = 0; i < group; ++i) next[u][i] = at[i < most ? i : most];
      }
    }
  }

  // Writes the elements to `panel`, with zeros from k_left on, and adds them over k to line_sum.
  TCAM_DEVICE void put(Number* panel, int k_left, Real (&line_sum)[group]) {
    const bool rare = operand.rare();
#pragma unroll
    for (int u = 0; u < own; ++u) {
      if (!exists(u)) continue;
      if (!rare) operand.usual(next[u]);
      if (k_left < Tile::depth) clear(next[u], u, k_left);
      Number to[group];
#pragma unroll
      for (int i = 0; i < group; ++i) {
        line_sum[i] += next[u][i];
        to[i] = rare ? bits_as<Number>(next[u][i]) : Tile::number(next[u][i]);
      }
      if (group_step == 1) {
        store_vector(place(panel, u), to);
      } else {
#pragma unroll
        for (int i = 0; i < group; ++i) place(panel, u)[i * group_step] = to[i];
      }
    }
    if (rare) apply_rare(panel, k_left);
  }

 private:
  TCAM_DEVICE static bool inside(int u, int i, int k_left) { return k(u) + (deep ? i : 0) < k_left; }
  TCAM_DEVICE static void clear(Real (&x)[group], int u, int k_left) {
#pragma unroll
    for (int i = 0; i < group; ++i)
      if (!inside(u, i, k_left)) x[i] = 0;
  }
  // The rare activations of the thread's elements, in place. A loop in code, as they are long.
  TCAM_DEVICE void apply_rare(Number* panel, int k_left) const {
#pragma unroll 1
    for (int e = 0; e < own * group; ++e) {
      const int u = e / group, i = e % group;
      if (!exists(u)) continue;
      Number& x = place(panel, u)[i * group_step];
      x = Tile::number(inside(u, i, k_left) ? operand.rare_value(bits_as<Real>(x)) : Real(0));
    }
  }
};

// Stores the block's tile of C, whose first element is (row0, column0). What a store reads is loaded for a batch of groups
// before any of them is written, so that the loads are in flight together.
template <class Tile, class Store>
TCAM_DEVICE void store_tile(const Tile& tile, const Store& store, bool vectors, int split, int64_t row0, int column0, int64_t m,
                            int n) {
  using Real = typename Tile::Real;
  constexpr int group = Tile::group, most = 16 / group, batch = Tile::groups < most ? Tile::groups : most;
#pragma unroll
  for (int first = 0; first < Tile::groups; first += batch) {
    Real x[batch][group];
#pragma unroll
    for (int g = 0; g < batch; ++g) {
      const int64_t r = row0 + Tile::row(first + g);
      const int c = column0 + Tile::column(first + g);
      const Real* const from = store.reads(split, r, c);
#pragma unroll
      for (int i = 0; i < group; ++i) x[g][i] = 0;
      if (!from || r >= m) continue;
      if (vectors && c + group <= n) {
        load_vector(x[g], from);
      } else {
#pragma unroll
        for (int i = 0; i < group; ++i)
          if (c + i < n) x[g][i] = from[i];
      }
    }
#pragma unroll
    for (int g = 0; g < batch; ++g) {
      const int64_t r = row0 + Tile::row(first + g);
      const int c = column0 + Tile::column(first + g);
      if (r >= m) continue;
#pragma unroll
      for (int i = 0; i < group; ++i) x[g][i] = store.value(tile.sums(first + g)[i], x[g][i]);
      if (vectors && c + group <= n) {
        store_vector(store.at(split, r, c), x[g]);
      } else {
#pragma unroll
        for (int i = 0; i < group; ++i)
          if (c + i < n) *store.at(split, r, c + i) = x[g][i];
      }
    }
  }
  if constexpr (Store::has_rare) {
    if (!store.rare()) return;
#pragma unroll 1
    for (int e = 0; e < Tile::groups * group; ++e) {  // a loop in code, as they are long
      const int64_t r = row0 + Tile::row(e / group);
      const int c = column0 + Tile::column(e / group) + e % group;
      if (r < m && c < n) *store.at(split, r, c) = store.rare_value(*store.at(split, r, c), *store.reads(split, r, c));
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
  int left = static_cast<int>(k - begin < k_chunk ? k - begin : k_chunk);  // of k, from the step that was last fetched on

  ReaderA a_reader(a, vectors.a, row0, m, begin);
  ReaderB b_reader(b, vectors.b, column0, n, begin);
  Real a_sum[group] = {}, b_sum[group] = {};  // over the thread's elements; b_sum is not used
  a_reader.fetch(left);
  b_reader.fetch(left);
  a_reader.put(a_panels, left, a_sum);
  b_reader.put(b_panels, left, b_sum);
  __syncthreads();
  Tile tile;
  int now = 0;
  for (left -= depth; left > 0; left -= depth, now ^= 1) {
    a_reader.fetch(left);
    b_reader.fetch(left);
    tile.template add<PanelA, PanelB>(a_panels + now * PanelA::size, b_panels + now * PanelB::size);
    a_reader.put(a_panels + (now ^ 1) * PanelA::size, left, a_sum);
    b_reader.put(b_panels + (now ^ 1) * PanelB::size, left, b_sum);
    __syncthreads();
  }
  tile.template add<PanelA, PanelB>(a_panels + now * PanelA::size, b_panels + now * PanelB::size);
  store_tile(tile, store, Tile::large || vectors.c, blockIdx.z, row0, column0, m, n);

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

template <class Tile, class A, class B, class Store>
cudaError_t launch_gemm(int64_t m, int n, int64_t k, int64_t k_chunk, Vectors vectors, A a, B b, Store store,
                        cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((m + Tile::rows - 1) / Tile::rows),
                  static_cast<unsigned>((n + Tile::columns - 1) / Tile::columns),
                  static_cast<unsigned>((k + k_chunk - 1) / k_chunk));
  constexpr size_t panels = Tile::template Panel<Tile::rows, A::columns_adjacent>::size +
                            Tile::template Panel<Tile::columns, !B::columns_adjacent>::size;
  constexpr size_t bytes = 2 * panels * sizeof(typename Tile::Number) + (Store::sums_rows ? gemm_threads * 16 : 0) + 64;
  return launch(gemm_kernel<Tile, A, B, Store>, grid, gemm_threads, bytes, stream, m, n, k, k_chunk, vectors, a, b, store);
}

// Launches gemm_kernel with tiles of Large where they are of use and all operands and results allow vectors, else of Small.
// Both give the same bits. k_chunk 0: a single split over all of k.
template <class Large, class Small, class A, class B, class Store>
cudaError_t gemm(int64_t m, int n, int64_t k, int64_t k_chunk, A a, B b, Store store, cudaStream_t stream) {
  constexpr int group = 16 / sizeof(typename Small::Real);
  if (k_chunk <= 0 || k_chunk > k) k_chunk = k;
  const bool chunks = k_chunk == k || k_chunk % group == 0;  // whether a split begins with a group
  const Vectors vectors = {on_vectors(a.data, a.pitch) && (chunks || !A::columns_adjacent),
                           on_vectors(b.data, b.pitch) && (chunks || B::columns_adjacent), store.can_use_vectors()};
  if (Large::large && m > Small::rows && n > Small::columns && vectors.a && vectors.b && vectors.c)
    return launch_gemm<Large>(m, n, k, k_chunk, vectors, a, b, store, stream);
  return launch_gemm<Small>(m, n, k, k_chunk, vectors, a, b, store, stream);
}

// ---- operands and results ---------------------------------------------------------------------

// Operands: a row-major matrix with `pitch` numbers from row to row (Rows), and the transpose of such a matrix (Transposed).
// columns_adjacent: whether neighbours in memory differ in the column. usual(x) or, where rare(), rare_value(x) turn numbers
// read into elements.
template <class Real>
struct Rows {
  static constexpr bool columns_adjacent = true;
  const Real* data;
  int64_t pitch;
  TCAM_DEVICE bool rare() const { return false; }
  TCAM_DEVICE Real rare_value(Real x) const { return x; }
  template <int count>
  TCAM_DEVICE void usual(Real (&)[count]) const {}
};
template <class Real>
struct Transposed {
  static constexpr bool columns_adjacent = false;
  const Real* data;
  int64_t pitch;
  TCAM_DEVICE bool rare() const { return false; }
  TCAM_DEVICE Real rare_value(Real x) const { return x; }
  template <int count>
  TCAM_DEVICE void usual(Real (&)[count]) const {}
};

// Stores: *at(split, r, c) = value(sum, *reads(split, r, c)). reads may return null for 0; else its neighbours belong to the
// neighbouring columns. sums_rows: whether the sums of the rows of A over a split's k are stored too. Where has_rare and
// rare(), value leaves the sum as it is, and rare_value(sum, read) follows. can_use_vectors: whether neighbours in a row of C
// are neighbours in memory, at aligned addresses.
//
// out[r, c] = sum + bias[c].
template <class Real>
struct WriteRows {
  static constexpr bool sums_rows = false, has_rare = false;
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
  static constexpr bool sums_rows = false, has_rare = false;
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
  static constexpr bool sums_rows = false, has_rare = false;
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
  static constexpr bool sums_rows = true, has_rare = false;
  Real* partials;  // (splits, rows, columns)
  int64_t rows, columns;
  Real* row_sums;  // (splits, rows); null: not wanted
  bool can_use_vectors() const { return on_vectors(partials, columns); }
  TCAM_DEVICE Real* at(int split, int64_t r, int c) const { return partials + (split * rows + r) * columns + c; }
  TCAM_DEVICE const Real* reads(int split, int64_t r, int c) const { return at(split, r, c); }
  TCAM_DEVICE Real value(Real sum, Real read) const { return sum + read; }
};

}  // namespace tcam
