// The walk over the voxels of a block, tile by tile, and the buffers of a tile. Included only by voxel_core.cpp, under the
// rules of simd.h.
#pragma once
#include "products.h"

namespace tcam {
namespace TCAM_ISA {

// The voxels of a block, tile by tile, as row offsets into the three maps and the volume.
struct Walk {
  const Maps& maps;
  const Block& block;
  long i, j, k;
  long a[max_tile], b[max_tile], g[max_tile], out[max_tile];

  __attribute__((always_inline)) Walk(const Maps& m, const Block& b0) : maps(m), block(b0), i(b0.i0), j(b0.j0), k(b0.k0) {}

  __attribute__((always_inline)) int next(int tile) {
    int n = 0;
    for (; n < tile && i < block.i1; ++n) {
      a[n] = i * maps.a_i + j * maps.a_j;
      b[n] = j * maps.b_j + k * maps.b_k;
      g[n] = i * maps.g_i + k * maps.g_k;
      out[n] = maps.order ? maps.order[j] : (i * maps.wide + j) * maps.deep + k;
      if (++k == block.k1) {
        k = block.k0;
        if (++j == block.j1) j = block.j0, ++i;
      }
    }
    return n;
  }
};

// Buffers of one thread. `h[l]` holds the activations of layer l as rows of words, `pairs[l]` the same interleaved by voxel for
// the weight gradient (identical if a word is one real), `slope[l]` the activation's slope (null where it follows from h).
// `delta_pairs` holds delta interleaved by voxel, in tiles as columns; `delta_1` also the deltas of higher layers that read the
// features, as in the maps.
template <class N, long pitch>
struct Scratch {
  typedef typename N::Word Word;
  typedef typename N::Real Real;
  Word *h[max_layers], *pairs[max_layers], *delta[2], *delta_pairs;
  Real *slope[max_layers], *delta_1, *z;
  long bytes = 0;

  __attribute__((always_inline)) Scratch(const Decoder& d, bool backward, void* base) {
    char* at = static_cast<char*>(base);
    auto take = [&](long size) {
      char* p = at ? at + bytes : nullptr;
      bytes += round_up(size, 64);
      return p;
    };
    const long words = max_tile * pitch * static_cast<long>(sizeof(Word));
    const long reals = max_tile * pitch * static_cast<long>(sizeof(Real));
    z = reinterpret_cast<Real*>(take(max_tile * max_out * static_cast<long>(sizeof(Real))));
    for (int l = 1; l < d.layers; ++l) h[l] = !backward && l > 2 ? h[l - 2] : reinterpret_cast<Word*>(take(words));
    if (!backward) return;
    for (int l = 1; l < d.layers; ++l) {
      const bool smooth = !slope_from_value(d.activation[l].kind);
      pairs[l] = N::pack == 1 ? h[l] : reinterpret_cast<Word*>(take(words / N::pack));
      slope[l] = smooth ? reinterpret_cast<Real*>(take(reals)) : nullptr;
    }
    delta[0] = reinterpret_cast<Word*>(take(words));
    delta[1] = reinterpret_cast<Word*>(take(words));
    delta_pairs = N::pack == 1 ? nullptr : reinterpret_cast<Word*>(take(words / N::pack));
    delta_1 = reinterpret_cast<Real*>(take(reals));
  }
};

}  // namespace TCAM_ISA
}  // namespace tcam
