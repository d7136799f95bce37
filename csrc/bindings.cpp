// Python's door to the kernels: unpack, check, release the GIL, call; one function an op.
// Every pointer that a kernel gets was checked here against the shapes it will read, so no
// argument from Python, however wrong, can make a kernel read or write outside its tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <limits>

#include "cpu/decode_grid.h"
#include "maths/activation.h"
#include "maths/loss.h"
#include "tensor.h"
#ifdef TCAM_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace tcam {
namespace {

#define TCAM_NAME(name) #name,
const char* const activation_names[] = {TCAM_HIDDEN_ACTIVATIONS(TCAM_NAME)};
const char* const output_activation_names[] = {TCAM_OUTPUT_ACTIVATIONS(TCAM_NAME)};
const char* const loss_names[] = {TCAM_LOSSES(TCAM_NAME)};
#undef TCAM_NAME
constexpr int hidden_count = sizeof(activation_names) / sizeof(char*);
constexpr int output_count = sizeof(output_activation_names) / sizeof(char*);
constexpr int loss_count = sizeof(loss_names) / sizeof(char*);

template <size_t n>
py::tuple names(const char* const (&list)[n]) {
  py::tuple t(n);
  for (size_t i = 0; i < n; ++i) t[i] = list[i];
  return t;
}

using Sizes = std::vector<int64_t>;

int64_t product(const Sizes& s) {
  int64_t n = 1;
  for (int64_t x : s) {
    if (x < 0 || (x && n > std::numeric_limits<int64_t>::max() / 64 / x)) throw py::value_error("a size is out of range");
    n *= x;
  }
  return n;
}

struct Options {  // what is not a tensor, in the order of library.py
  Sizes size, box;
  int activation, output_activation, align_corners, padding, compute, out_dtype, threads, tile;
};

// The tensors and the problem of one decode_grid call, checked against each other.
struct DecodeGrid {
  tcam_decode_grid problem{};
  std::vector<Tensor> planes, weights, biases;
  std::vector<const void*> plane_data, weight_data, bias_data;
  DLDevice device{};
  bool empty = false;

  DecodeGrid(const py::list& planes_in, const py::list& weights_in, const py::list& biases_in, const Options& o) {
    if (planes_in.size() != 3) throw py::value_error("planes: expected 3 tensors");
    if (weights_in.size() < 1 || weights_in.size() > TCAM_MAX_LAYERS) throw py::value_error("weights: expected 1 to 6 layers");
    if (biases_in.size() != weights_in.size()) throw py::value_error("biases: expected one (or None) for each weight");
    if (o.size.size() != 3 || o.box.size() != 6) throw py::value_error("size: expected 3 numbers; box: expected 6");
    for (size_t q = 0; q < 3; ++q) planes.emplace_back(planes_in[q], "planes[" + std::to_string(q) + "]");
    device = planes[0].device;
    const int dtype = planes[0].dtype;
    if (dtype != TCAM_F32 && dtype != TCAM_F64) throw py::type_error("planes: expected float32 or float64");
    if (planes[0].shape.size() != 4 || planes[1].shape.size() != 4) throw py::value_error("planes: expected 4 dimensions");
    const int64_t batch = planes[0].shape[0], c = planes[0].shape[1], h = planes[0].shape[2], w = planes[0].shape[3],
                  d = planes[1].shape[3];
    planes[0].expect("planes[0]", {batch, c, h, w}, dtype, device);
    planes[1].expect("planes[1]", {batch, c, w, d}, dtype, device);
    planes[2].expect("planes[2]", {batch, c, h, d}, dtype, device);
    if (c < 1 || c > TCAM_MAX_WIDTH) throw py::value_error("planes: expected 1 to 256 channels");
    if (h < 1 || w < 1 || d < 1) throw py::value_error("planes: expected at least one texel on each axis");
    if (h > INT32_MAX || w > INT32_MAX || d > INT32_MAX) throw py::value_error("planes: an axis is too long");

    problem.batch = batch;
    problem.channels = c;
    const int64_t texels[3] = {h, w, d};
    problem.width[0] = 3 * c;
    problem.layers = static_cast<int32_t>(weights_in.size());
    for (size_t l = 0; l < weights_in.size(); ++l) {
      const std::string name = "weights[" + std::to_string(l) + "]";
      weights.emplace_back(weights_in[l], name);
      if (weights[l].shape.size() != 2) throw py::value_error(name + ": expected 2 dimensions");
      const int64_t n = weights[l].shape[0],
                    most = l + 1 == weights_in.size() ? int64_t(TCAM_MAX_OUT) : int64_t(TCAM_MAX_WIDTH);
      if (n < 1 || n > most) throw py::value_error(name + ": expected 1 to " + std::to_string(most) + " rows");
      weights[l].expect(name, {n, problem.width[l]}, dtype, device);
      problem.width[l + 1] = n;
      if (biases_in[l].is_none()) {
        biases.emplace_back();
      } else {
        biases.emplace_back(biases_in[l], "biases[" + std::to_string(l) + "]");
        biases[l].expect("biases[" + std::to_string(l) + "]", {n}, dtype, device);
      }
      weight_data.push_back(weights[l].data);
      bias_data.push_back(biases[l].data);
    }
    for (const Tensor& t : planes) plane_data.push_back(t.data);

    for (int a = 0; a < 3; ++a) {
      problem.planes[a] = texels[a];
      problem.size[a] = o.size[a];
      problem.lo[a] = o.box[2 * a];
      problem.hi[a] = o.box[2 * a + 1];
      if (problem.lo[a] < 0 || problem.hi[a] < problem.lo[a] || problem.hi[a] > problem.size[a] || problem.size[a] > INT32_MAX)
        throw py::value_error("box: expected 0 <= lo <= hi <= size <= 2^31 - 1");
      if (problem.hi[a] == problem.lo[a]) empty = true;
    }
    if (batch == 0) empty = true;
    if (o.activation < 0 || o.activation >= hidden_count) throw py::value_error("activation: out of range");
    if (o.output_activation < 0 || o.output_activation >= output_count)
      throw py::value_error("output_activation: out of range");
    if (o.padding != TCAM_PAD_BORDER && o.padding != TCAM_PAD_ZEROS) throw py::value_error("padding: out of range");
    const bool rounded = o.compute == TCAM_BF16 || o.compute == TCAM_F16 || o.compute == TCAM_TF32;
    if (o.compute != dtype && !(rounded && dtype == TCAM_F32))
      throw py::value_error("compute: does not fit the tensors' dtype");
    if (o.out_dtype < TCAM_F32 || o.out_dtype > TCAM_BF16) throw py::value_error("out_dtype: out of range");
    problem.activation = o.activation;
    problem.output_activation = o.output_activation;
    problem.align_corners = o.align_corners != 0;
    problem.padding = o.padding;
    problem.dtype = dtype;
    problem.compute = o.compute;
    problem.out_dtype = o.out_dtype;
    problem.threads = o.threads < 1 ? 1 : (o.threads > 4096 ? 4096 : o.threads);
    problem.tile = o.tile;
    product(out_shape());
  }

  Sizes out_shape() const {
    const tcam_decode_grid& p = problem;
    return {p.batch, p.width[p.layers], p.hi[0] - p.lo[0], p.hi[1] - p.lo[1], p.hi[2] - p.lo[2]};
  }
};

// cpu() or cuda(device, stream), which returns a status, as the device asks; without the GIL.
template <class Cpu, class Cuda>
void run_on(DLDevice device, Cpu cpu, Cuda cuda) {
  if (device.type == device_cpu) {
    py::gil_scoped_release release;
    return cpu();
  }
#ifdef TCAM_WITH_CUDA
  void* stream = TensorApi::get().stream(device);
  int status;
  {
    py::gil_scoped_release release;
    status = cuda(device.id, stream);
  }
  if (status) throw std::runtime_error(std::string("tcam_ext: CUDA: ") + tcam_cuda_error(status));
#else
  (void)cuda;
  throw std::runtime_error("tcam_ext was built without CUDA; install it where nvcc is found, or use impl=\"reference\"");
#endif
}

int64_t workspace_bytes(const DecodeGrid& call, bool backward) {
#ifdef TCAM_WITH_CUDA
  if (call.device.type == device_cuda) return tcam_decode_grid_cuda_workspace(&call.problem, backward);
#endif
  return tcam_decode_grid_cpu_workspace(&call.problem, backward);
}

constexpr uintptr_t workspace_alignment = 256;

void* workspace_of(const Tensor& t, int64_t bytes, DLDevice device) {
  if (t.device.type != device.type || t.device.id != device.id || t.dtype != TCAM_U8)
    throw py::value_error("workspace: expected a uint8 tensor on the same device");
  bytes += workspace_alignment;
  if (t.count < bytes) throw py::value_error("workspace: expected at least " + std::to_string(bytes) + " bytes");
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data), end = begin + static_cast<uintptr_t>(t.count);
#ifdef __linux__  // huge pages: fewer faults on fresh memory, fewer TLB misses in the tiles
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t first = (begin + huge - 1) & ~(huge - 1), last = end & ~(huge - 1);
  if (device.type == device_cpu && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return reinterpret_cast<void*>((begin + workspace_alignment - 1) & ~(workspace_alignment - 1));
}

Options options(const Sizes& size, const Sizes& box, int activation, int output_activation, bool align_corners, int padding,
                int compute, int out_dtype, int threads, int tile) {
  return {size, box, activation, output_activation, align_corners, padding, compute, out_dtype, threads, tile};
}

int64_t decode_grid_workspace(const py::list& planes, const py::list& weights, const py::list& biases, const Options& o,
                              bool backward, bool grad_planes, bool grad_decoder) {
  DecodeGrid call(planes, weights, biases, o);
  if (call.empty) return workspace_alignment;
  call.problem.grad_planes = grad_planes;
  call.problem.grad_decoder = grad_decoder;
  return workspace_bytes(call, backward) + workspace_alignment;
}

#ifdef TCAM_WITH_CUDA
#define TCAM_ON_CUDA(call) [&](int device, void* stream) { return call; }
#else
#define TCAM_ON_CUDA(call) 0
#endif

void decode_grid(const py::list& planes, const py::list& weights, const py::list& biases, const Options& o, py::handle volume,
                 py::handle workspace) {
  const DecodeGrid call(planes, weights, biases, o);
  const Tensor out(volume, "volume"), ws(workspace, "workspace");
  out.expect("volume", call.out_shape(), o.out_dtype, call.device);
  if (call.empty) return;
  void* scratch = workspace_of(ws, workspace_bytes(call, false), call.device);
  const void *const *p = call.plane_data.data(), *const *w = call.weight_data.data(), *const *b = call.bias_data.data();
  run_on(
      call.device, [&] { tcam_decode_grid_cpu(&call.problem, p, w, b, out.data, scratch); },
      TCAM_ON_CUDA(tcam_decode_grid_cuda(&call.problem, p, w, b, out.data, scratch, device, stream)));
}

// Where gradients go: 3 planes or none; weights, then biases (None where there is no bias), or none. Says in `call.problem`
// which are wanted. With `per_object`, those of the decoder have a leading axis B.
struct Gradients {
  std::vector<void*> planes, weights, biases;

  Gradients(DecodeGrid& call, const py::list& to_planes, const py::list& to_decoder, bool per_object) {
    const size_t layers = call.weights.size();
    planes.assign(3, nullptr);
    weights.assign(layers, nullptr);
    biases.assign(layers, nullptr);
    auto expect = [&](py::handle object, const std::string& name, Sizes shape, bool leading) {
      if (leading) shape.insert(shape.begin(), call.problem.batch);
      const Tensor t(object, name);
      t.expect(name, shape, call.problem.dtype, call.device);
      return t.data;
    };
    if (to_planes.size()) {
      if (to_planes.size() != 3) throw py::value_error("grad_planes: expected 3 tensors or none");
      for (size_t q = 0; q < 3; ++q) planes[q] = expect(to_planes[q], "grad_planes", call.planes[q].shape, false);
    }
    if (to_decoder.size()) {
      if (to_decoder.size() != 2 * layers) throw py::value_error("grad_decoder: expected weights, then biases");
      for (size_t l = 0; l < layers; ++l) {
        weights[l] = expect(to_decoder[l], "grad_weights", call.weights[l].shape, per_object);
        if (!to_decoder[layers + l].is_none())
          biases[l] = expect(to_decoder[layers + l], "grad_biases", {call.weights[l].shape[0]}, per_object);
      }
    }
    call.problem.grad_planes = to_planes.size() > 0;
    call.problem.grad_decoder = to_decoder.size() > 0;
  }
};

void decode_grid_backward(py::handle grad_volume, const py::list& planes, const py::list& weights, const py::list& biases,
                          const Options& o, const py::list& grad_planes, const py::list& grad_decoder, py::handle workspace) {
  DecodeGrid call(planes, weights, biases, o);
  const Tensor grad(grad_volume, "grad_volume"), ws(workspace, "workspace");
  grad.expect("grad_volume", call.out_shape(), o.out_dtype, call.device);
  const Gradients to(call, grad_planes, grad_decoder, false);
  if (call.empty) throw py::value_error("decode_grid_backward: nothing to do for an empty volume");
  void* scratch = workspace_of(ws, workspace_bytes(call, true), call.device);
  const void *const *p = call.plane_data.data(), *const *w = call.weight_data.data(), *const *b = call.bias_data.data();
  void *const *gp = to.planes.data(), *const *gw = to.weights.data(), *const *gb = to.biases.data();
  run_on(
      call.device, [&] { tcam_decode_grid_backward_cpu(&call.problem, grad.data, p, w, b, gp, gw, gb, scratch); },
      TCAM_ON_CUDA(tcam_decode_grid_backward_cuda(&call.problem, grad.data, p, w, b, gp, gw, gb, scratch, device, stream)));
}

void decode_grid_loss(py::handle target, const py::list& planes, const py::list& weights, const py::list& biases,
                      const Options& o, int loss, double beta, bool per_object, py::handle losses, const py::list& grad_planes,
                      const py::list& grad_decoder, py::handle workspace) {
  DecodeGrid call(planes, weights, biases, o);
  const Tensor want(target, "target"), sums(losses, "losses"), ws(workspace, "workspace");
  want.expect("target", call.out_shape(), want.dtype, call.device);
  sums.expect("losses", {call.problem.batch}, TCAM_F64, call.device);
  if (loss < 0 || loss >= loss_count) throw py::value_error("loss: out of range");
  if (!(beta >= 0)) throw py::value_error("beta: expected a number >= 0");
  const Gradients to(call, grad_planes, grad_decoder, per_object);
  if (call.empty) throw py::value_error("decode_grid_loss: nothing to do for an empty volume");
  const tcam_objective objective = {want.data, want.dtype, loss, beta, per_object};
  const bool backward = call.problem.grad_planes || call.problem.grad_decoder;
  void* scratch = workspace_of(ws, workspace_bytes(call, backward), call.device);
  double* to_sums = static_cast<double*>(sums.data);
  const void *const *p = call.plane_data.data(), *const *w = call.weight_data.data(), *const *b = call.bias_data.data();
  void *const *gp = to.planes.data(), *const *gw = to.weights.data(), *const *gb = to.biases.data();
  run_on(
      call.device, [&] { tcam_decode_grid_loss_cpu(&call.problem, &objective, p, w, b, to_sums, gp, gw, gb, scratch); },
      TCAM_ON_CUDA(
          tcam_decode_grid_loss_cuda(&call.problem, &objective, p, w, b, to_sums, gp, gw, gb, scratch, device, stream)));
}

// plane (m0, m1, C) to out (n0, n1, C), on the device that holds them.
void resample_plane(py::handle plane, py::handle out, bool align_corners, int padding, int threads) {
  const Tensor p(plane, "plane"), v(out, "out");
  if (p.shape.size() != 3 || v.shape.size() != 3) throw py::value_error("plane, out: expected 3 dimensions");
  if (p.dtype != TCAM_F32 && p.dtype != TCAM_F64) throw py::type_error("plane: expected float32 or float64");
  v.expect("out", {v.shape[0], v.shape[1], p.shape[2]}, p.dtype, p.device);
  for (int64_t m : {p.shape[0], p.shape[1], v.shape[0], v.shape[1]})
    if (m > INT32_MAX) throw py::value_error("plane, out: an axis is too long");
  if (v.count == 0) return;
  if (p.count == 0) throw py::value_error("plane: is empty");
  if (padding != TCAM_PAD_BORDER && padding != TCAM_PAD_ZEROS) throw py::value_error("padding: out of range");
  const int64_t c = p.shape[2];
  run_on(
      p.device,
      [&] {
        tcam_resample_plane_cpu(p.data, p.shape[0], p.shape[1], c, v.shape[0], v.shape[1], align_corners, padding, p.dtype,
                                threads, v.data);
      },
      TCAM_ON_CUDA(tcam_resample_plane_cuda(p.data, p.shape[0], p.shape[1], c, v.shape[0], v.shape[1], align_corners, padding,
                                            p.dtype, v.data, device, stream)));
}

py::dict cuda_info() {
  py::dict info;
#ifdef TCAM_WITH_CUDA
  info["built"] = true;
  info["architectures"] = TCAM_CUDA_ARCHITECTURES;
  int runtime = 0, driver = 0, devices = 0;
  const int status = tcam_cuda_info(&runtime, &driver, &devices);
  info["runtime"] = runtime;
  info["driver"] = driver;
  info["devices"] = status ? 0 : devices;
  info["error"] = status ? py::object(py::str(tcam_cuda_error(status))) : py::object(py::none());
#else
  info["built"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace tcam

PYBIND11_MODULE(_C, m) {
  using namespace tcam;
  m.doc() = "Kernels of tcam_ext. Use tcam_ext's public functions.";
  m.attr("version") = TCAM_VERSION;
  m.attr("source_hash") = TCAM_SOURCE_HASH;
  m.attr("compiler") = __VERSION__;
  m.attr("activations") = names(activation_names);
  m.attr("output_activations") = names(output_activation_names);
  m.attr("losses") = names(loss_names);
  m.def("bind",
        [](py::object tensor, py::object parameter) { TensorApi::get().bind(std::move(tensor), std::move(parameter)); });
  m.def("cpu_isa", &tcam_cpu_isa);
  m.def("cpu_has_bf16", [] { return tcam_cpu_has_bf16() != 0; });
  m.def("cpu_forked", [] { return tcam_cpu_forked() != 0; });
  m.def(
      "cpu_peak_flops",
      [](int kind, double seconds, int threads) {
        if (kind < 0 || kind > 2 || !(seconds > 0 && seconds < 60) || threads < 1 || threads > 4096)
          throw py::value_error("cpu_peak_flops: kind 0 to 2, 0 < seconds < 60, threads >= 1");
        py::gil_scoped_release release;
        return tcam_cpu_peak_flops(kind, seconds, threads);
      },
      py::arg("kind"), py::arg("seconds"), py::arg("threads"));
#ifdef TCAM_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("cuda_info", &cuda_info);
  py::class_<Options>(m, "Options")
      .def(py::init(&options), py::arg("size"), py::arg("box"), py::arg("activation"), py::arg("output_activation"),
           py::arg("align_corners"), py::arg("padding"), py::arg("compute"), py::arg("out_dtype"), py::arg("threads"),
           py::arg("tile") = 0);
  m.def("decode_grid_workspace", &decode_grid_workspace);
  m.def("decode_grid", &decode_grid);
  m.def("decode_grid_backward", &decode_grid_backward);
  m.def("decode_grid_loss", &decode_grid_loss);
  m.def("resample_plane", &resample_plane);
}
