// The CPU kernels of another architecture as a process: reads calls from its standard input and writes their results to its
// standard output (tests/ops/arm.py). Numbers are in the byte order of both sides, little-endian.
//
// A call is its number (Call), a struct of problem.h, and arrays: each the number of its bytes, -1 for null, and the bytes. An
// output has a number of bytes alone. The answer is the outputs' bytes, in order. Outputs and the workspace start as NaN.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cpu/decode.h"

namespace {

enum Call : int32_t { decode, decode_backward, decode_loss, normals, resample };

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(std::feof(stdin) ? 0 : 1);
}
template <class T>
T read() {
  T value;
  read(&value, sizeof value);
  return value;
}

// Arrays of a call, aligned to 64 bytes.
class Arrays {
 public:
  void* input() { return take(true); }
  void* output() {
    const int64_t before = bytes_;
    void* p = take(false);
    if (p) outputs_.push_back({p, static_cast<size_t>(bytes_ - before)});
    return p;
  }
  std::vector<const void*> inputs(int count) {
    std::vector<const void*> list(static_cast<size_t>(count));
    for (auto& p : list) p = input();
    return list;
  }
  std::vector<void*> outputs(int count) {
    std::vector<void*> list(static_cast<size_t>(count));
    for (auto& p : list) p = output();
    return list;
  }
  void* workspace(const tcam_problem& problem, bool backward) {
    return fresh(tcam_decode_cpu_workspace(&problem, backward) + 256);
  }
  void answer() const {
    for (const auto& o : outputs_) std::fwrite(o.data, 1, o.bytes, stdout);
    std::fflush(stdout);
  }

 private:
  struct Output {
    void* data;
    size_t bytes;
  };
  std::vector<std::unique_ptr<char[]>> kept_;
  std::vector<Output> outputs_;
  int64_t bytes_ = 0;

  void* fresh(int64_t bytes) {
    kept_.emplace_back(new char[static_cast<size_t>(bytes) + 256]);
    void* p = kept_.back().get();
    size_t space = static_cast<size_t>(bytes) + 256;
    p = std::align(256, static_cast<size_t>(bytes), p, space);
    std::memset(p, 0xff, static_cast<size_t>(bytes));
    return p;
  }
  void* take(bool filled) {
    const int64_t bytes = read<int64_t>();
    if (bytes < 0) return nullptr;
    bytes_ += bytes;
    void* p = fresh(bytes);
    if (filled) read(p, static_cast<size_t>(bytes));
    return p;
  }
};

void run(Call call) {
  Arrays arrays;
  if (call == normals) {
    const auto problem = read<tcam_normals>();
    tcam_normals_cpu(&problem, static_cast<float*>(arrays.output()));
    return arrays.answer();
  }
  if (call == resample) {
    const auto problem = read<tcam_resample>();
    const void* bounds = arrays.input();
    const void* in = arrays.input();
    tcam_resample_axis_cpu(&problem, static_cast<const double*>(bounds), in, arrays.output());
    return arrays.answer();
  }
  const auto p = read<tcam_problem>();
  const auto planes = arrays.inputs(p.plane_count), weights = arrays.inputs(p.layers), biases = arrays.inputs(p.layers);
  const void* bounds = arrays.input();
  const void* points = arrays.input();
  const void* objects = arrays.input();
  const tcam_inputs in = {planes.data(), weights.data(),
                          biases.data(), static_cast<const double*>(bounds),
                          points,        static_cast<const int64_t*>(objects),
                          arrays.input()};
  if (call == decode) {
    tcam_decode_cpu(&p, &in, arrays.output(), arrays.workspace(p, false));
    return arrays.answer();
  }
  tcam_objective objective = {};
  void* losses = nullptr;
  const void* grad = nullptr;
  if (call == decode_loss) {
    objective = read<tcam_objective>();
    objective.target = arrays.input();
    losses = arrays.output();
  } else {
    grad = arrays.input();
  }
  const auto to_planes = arrays.outputs(p.plane_count), to_weights = arrays.outputs(p.layers),
             to_biases = arrays.outputs(p.layers);
  void* to_points = arrays.output();
  const tcam_gradients to = {to_planes.data(), to_weights.data(), to_biases.data(), to_points, arrays.output()};
  if (call == decode_loss)
    tcam_decode_loss_cpu(&p, &objective, &in, static_cast<double*>(losses), &to, arrays.workspace(p, true));
  else
    tcam_decode_backward_cpu(&p, grad, &in, &to, arrays.workspace(p, true));
  arrays.answer();
}

}  // namespace

int main() {
  for (;;) run(static_cast<Call>(read<int32_t>()));
}
