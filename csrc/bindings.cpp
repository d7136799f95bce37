// The Python binding, tcam_ext._C: one function for each op, which checks its arguments, releases the GIL and calls the
// kernel, and the tables and limits that Python reads.
#include "call.h"

namespace tcam {
namespace {

#define TCAM_NAME(name) #name,
const char* const activation_names[] = {TCAM_HIDDEN_ACTIVATIONS(TCAM_NAME)};
const char* const output_activation_names[] = {TCAM_OUTPUT_ACTIVATIONS(TCAM_NAME)};
const char* const loss_names[] = {TCAM_LOSSES(TCAM_NAME)};
#undef TCAM_NAME
#define TCAM_NAME(constant, name) #name,
const char* const dtype_names[] = {TCAM_DTYPES(TCAM_NAME)};
const char* const padding_names[] = {TCAM_PADDINGS(TCAM_NAME)};
const char* const reduce_names[] = {TCAM_REDUCTIONS(TCAM_NAME)};
const char* const formulation_names[] = {TCAM_FORMULATIONS(TCAM_NAME)};
#undef TCAM_NAME

template <size_t n>
py::tuple names(const char* const (&list)[n]) {
  py::tuple t(n);
  for (size_t i = 0; i < n; ++i) t[i] = list[i];
  return t;
}

// The fields of tcam_problem in memory: name, offset, bytes of an element, number of elements (0: not an array), type.
py::list problem_layout() {
  py::list fields;
  auto add = [&](const char* name, size_t offset, size_t bytes, size_t count, const char* kind) {
    fields.append(py::make_tuple(name, offset, bytes, count, kind));
  };
#define TCAM_FIELD(type, name) add(#name, offsetof(tcam_problem, name), sizeof(type), 0, #type);
#define TCAM_ARRAY(type, name, count) add(#name, offsetof(tcam_problem, name), sizeof(type), count, #type);
#define TCAM_OPTION(type, name, default_value, least, most) TCAM_FIELD(type, name)
  TCAM_PROBLEM(TCAM_FIELD, TCAM_ARRAY, TCAM_OPTION)
#undef TCAM_FIELD
#undef TCAM_ARRAY
#undef TCAM_OPTION
  return fields;
}

// Resamples x (outer, n, inner) along its middle axis; see tcam_resample. bounds: None or (2,) float64 on the same device.
void resample_axis(py::handle x, py::handle out, int64_t texels, int64_t size, int64_t lo, int64_t hi, bool align_corners,
                   int padding, bool corners, py::object bounds, bool adjoint, int threads) {
  const Tensor in(x, "x"), to(out, "out");
  if (in.shape.size() != 3 || to.shape.size() != 3) throw py::value_error("x, out: expected 3 dimensions");
  if (in.dtype != TCAM_F32 && in.dtype != TCAM_F64) throw py::type_error("x: expected float32 or float64");
  if (texels < 1 || texels > INT32_MAX || lo < 0 || hi < lo || size < hi || size > INT32_MAX)
    throw py::value_error("texels, size, lo, hi: out of range");
  const int64_t outer = in.shape[0], inner = in.shape[2];
  in.expect("x", {outer, adjoint ? hi - lo : texels, inner}, in.dtype, in.device);
  to.expect("out", {outer, adjoint ? texels : hi - lo, inner}, in.dtype, in.device);
  between("padding", padding, int(TCAM_PAD_BORDER), int(TCAM_PAD_REFLECTION));
  Tensor b;
  if (!bounds.is_none()) {
    b = Tensor(bounds, "bounds");
    b.expect("bounds", {2}, TCAM_F64, in.device);
  }
  if (to.count == 0) return;
  const tcam_resample problem = {outer,         inner,   texels,  size,    lo,       hi,
                                 align_corners, padding, corners, adjoint, in.dtype, threads};
  const double* at = static_cast<const double*>(b.data);
  run_on(
      in.device, [&] { tcam_resample_axis_cpu(&problem, at, in.data, to.data); },
      TCAM_ON_CUDA(tcam_resample_axis_cuda(&problem, at, in.data, to.data, device, stream)));
}

// Fills out (objects, ...), float32, with standard normals of a seed and a sequence of maths/noise.h.
void normals(py::handle out, int sequence, uint64_t seed, int threads) {
  const Tensor to(out, "out");
  if (to.shape.empty() || to.dtype != TCAM_F32) throw py::value_error("out: expected float32 of one dimension or more");
  between("sequence", sequence, 0, 31);
  if (to.shape[0] > max_noise_objects) throw py::value_error("out: too many objects for noise");
  if (!to.count) return;
  const tcam_normals problem = {seed, to.shape[0], to.count / to.shape[0], sequence, threads};
  if (problem.count > int64_t(1) << 33) throw py::value_error("out: too many numbers an object");
  float* at = static_cast<float*>(to.data);
  run_on(to.device, [&] { tcam_normals_cpu(&problem, at); }, TCAM_ON_CUDA(tcam_normals_cuda(&problem, at, device, stream)));
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  tcam_philox_cpu(counter.data(), key[0], key[1]);
  return counter;
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

// The bytes of shared memory that a block of a CUDA device may have, and whether it runs the kernels with wgmma.
std::pair<int, bool> cuda_device(int device) {
#ifdef TCAM_WITH_CUDA
  int bytes = 0, warpgroups = 0;
  const int status = tcam_cuda_device(device, &bytes, &warpgroups);
  if (status) throw std::runtime_error(std::string("tcam_ext: CUDA: ") + tcam_cuda_error(status));
  return {bytes, warpgroups != 0};
#else
  (void)device;
  throw std::runtime_error("tcam_ext was built without CUDA; install it where nvcc is found");
#endif
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
  m.attr("dtypes") = names(dtype_names);
  m.attr("paddings") = names(padding_names);
  m.attr("reductions") = names(reduce_names);
  m.attr("formulations") = names(formulation_names);
  m.attr("max_layers") = int(TCAM_MAX_LAYERS);
  m.attr("max_width") = int(TCAM_MAX_WIDTH);
  m.attr("max_out") = int(TCAM_MAX_OUT);
  m.attr("max_planes") = int(TCAM_MAX_PLANES);
  m.attr("max_axes") = int(TCAM_MAX_AXES);
  m.attr("skip_step") = int(TCAM_SKIP_STEP);
  m.attr("max_noise_objects") = max_noise_objects;
  m.def("problem_layout", &problem_layout);
  m.def("bind",
        [](py::object tensor, py::object parameter) { TensorApi::get().bind(std::move(tensor), std::move(parameter)); });
  m.def("cpu_isa", &tcam_cpu_isa);
  m.def("cpu_bf16_is_fast", [] { return tcam_cpu_bf16_is_fast() != 0; });
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
  m.def("cuda_device", &cuda_device, py::arg("device"));
  py::class_<Options> options(m, "Options");
  options.def(py::init<>());
  options.def_readwrite("plane_axes", &Options::plane_axes)
      .def_readwrite("groups", &Options::groups)
      .def_readwrite("size", &Options::size)
      .def_readwrite("box", &Options::box)
      .def_readwrite("activation", &Options::activation)
      .def_readwrite("skips", &Options::skips)
      .def_readwrite("output_activation", &Options::output_activation);
#define TCAM_NONE(...)
#define TCAM_OPTION(type, name, default_value, least, most)   \
  options.def_property(                                       \
      #name, [](const Options& o) { return o.problem.name; }, \
      [](Options& o, type value) { o.problem.name = between<type>(#name, value, least, most); });
  TCAM_PROBLEM(TCAM_NONE, TCAM_NONE, TCAM_OPTION)
#undef TCAM_OPTION
#undef TCAM_NONE
  py::class_<Call>(m, "Call")
      .def(py::init<py::list, py::list, py::list, py::object, py::object, py::object, py::object, const Options&>(),
           py::arg("planes"), py::arg("weights"), py::arg("biases"), py::arg("bounds"), py::arg("points"), py::arg("objects"),
           py::arg("extra"), py::arg("options"))
      .def("workspace", &Call::workspace)
      .def("explain", &Call::explain, py::arg("output"), py::arg("shared_limit"), py::arg("warpgroups"))
      .def("forward", &Call::forward)
      .def("backward", &Call::backward)
      .def("loss", &Call::loss);
  m.def("resample_axis", &resample_axis);
  m.def("normals", &normals, py::arg("out"), py::arg("sequence"), py::arg("seed"), py::arg("threads"));
  m.def("philox", &philox, py::arg("counter"), py::arg("key"));
}
