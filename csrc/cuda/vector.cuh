// Loads and stores of up to 16 bytes at once.
#pragma once
#include "device.cuh"

namespace tcam {

// load_vector and store_vector copy `count` numbers from or to an aligned address, up to 16 bytes at once.
template <class T, int count>
struct alignas(count * sizeof(T) < 16 ? count * sizeof(T) : 16) Chunk {
  static constexpr int size = count * sizeof(T) < 16 ? count : 16 / sizeof(T);
  T x[size];
};
template <class T, int count>
TCAM_DEVICE void load_vector(T (&to)[count], const T* from) {
  using Part = Chunk<T, count>;
#pragma unroll
  for (int i = 0; i < count; i += Part::size) {
    const Part part = *reinterpret_cast<const Part*>(from + i);
#pragma unroll
    for (int j = 0; j < Part::size; ++j) to[i + j] = part.x[j];
  }
}
template <class T, int count>
TCAM_DEVICE void store_vector(T* to, const T (&from)[count]) {
  using Part = Chunk<T, count>;
#pragma unroll
  for (int i = 0; i < count; i += Part::size) {
    Part part;
#pragma unroll
    for (int j = 0; j < Part::size; ++j) part.x[j] = from[i + j];
    *reinterpret_cast<Part*>(to + i) = part;
  }
}
// Whether rows of numbers, `pitch` from one to the next, begin at addresses divisible by 16. True for null.
template <class T>
bool on_vectors(const T* data, int64_t pitch) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch * sizeof(T) % 16 == 0;
}

}  // namespace tcam
