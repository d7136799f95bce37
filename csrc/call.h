// A decode as Python calls it: Options (the arguments that are not tensors) and Call (the tensors and the problem, checked).
// Call compares every pointer that a kernel gets with the shapes that the kernel reads, so that no argument from Python,
// however wrong, makes a kernel read or write outside its tensors.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <limits>

#include "cpu/decode.h"
#include "formulation.h"
#include "maths/activation.h"
#include "maths/loss.h"
#include "tensor.h"
#ifdef TCAM_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace tcam {

#define TCAM_ONE(name) +1
constexpr int hidden_count = TCAM_HIDDEN_ACTIVATIONS(TCAM_ONE);
constexpr int output_count = TCAM_OUTPUT_ACTIVATIONS(TCAM_ONE);
constexpr int loss_count = TCAM_LOSSES(TCAM_ONE);
#undef TCAM_ONE

using Sizes = std::vector<int64_t>;

inline int64_t product(const Sizes& s) {
  int64_t n = 1;
  for (int64_t x : s) {
    if (x < 0 || (x && n > std::numeric_limits<int64_t>::max() / 64 / x)) throw py::value_error("a size is out of range");
    n *= x;
  }
  return n;
}

// Runs cpu(), or cuda(device, stream), which returns a status, without the GIL.
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

#ifdef TCAM_WITH_CUDA
#define TCAM_ON_CUDA(call) [&](int device, void* stream) { return call; }
#else
#define TCAM_ON_CUDA(call) 0
#endif

template <class T>
T between(const char* name, T value, T least, T most) {
  if (!(value >= least && value <= most))
    throw py::value_error(std::string(name) + ": expected " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
                          std::to_string(value));
  return value;
}

// The arguments that are not tensors, set by library.py. Call fills in the fields of `problem` that follow from the tensors.
struct Options {
  tcam_problem problem{};
  std::vector<std::pair<int, int>> plane_axes;     // row axis and column axis of each plane
  std::vector<int> groups;                         // the number of planes of each group
  Sizes size, box;                                 // of a grid
  std::vector<std::pair<int, double>> activation;  // of each hidden layer: kind, parameter
  std::vector<std::pair<int, int>> skips;          // layers that read the features too, ascending, and their rows of weights[0]
  std::pair<int, double> output_activation{0, 0};

  Options() {
#define TCAM_NONE(...)
#define TCAM_DEFAULT(type, name, default_value, least, most) problem.name = default_value;
    TCAM_PROBLEM(TCAM_NONE, TCAM_NONE, TCAM_DEFAULT)
#undef TCAM_DEFAULT
#undef TCAM_NONE
  }
};

constexpr uintptr_t workspace_alignment = 256;
constexpr int64_t max_noise_objects = 1 << 27;  // the range of NoiseKey

// The tensors and the problem of one call, checked against each other. Keeps the tensors alive.
class Call {
 public:
  Call(py::list planes, py::list weights, py::list biases, py::object bounds, py::object points, py::object objects,
       py::object extra, const Options& o)
      : kept_{planes, weights, biases, bounds, points, objects, extra}, p_(o.problem) {
    take_planes(planes, o);
    take_layers(weights, biases, extra.is_none() ? 0 : take_extra(extra), o);
    if (points.is_none())
      take_grid(bounds, o);
    else
      take_points(points, objects);
    if (p_.extra && extra_.shape != Sizes{place_count(), p_.extra})
      throw py::value_error("extra: expected shape (points, or voxels of the box for each object, features)");
    if (!p_.layers) p_.noise_std = 0;
    if (p_.noise_std != 0 && p_.batch > max_noise_objects) throw py::value_error("planes: too many objects for noise");
    const bool rounded = p_.compute == TCAM_BF16 || p_.compute == TCAM_F16 || p_.compute == TCAM_TF32;
    if (p_.compute != p_.dtype && !(rounded && p_.dtype == TCAM_F32))
      throw py::value_error("compute: does not fit the tensors' dtype");
    p_.grad_decoder = p_.grad_decoder && p_.layers;
    p_.grad_points = p_.grad_points && p_.points >= 0;
    p_.grad_extra = p_.grad_extra && p_.extra;
    for (int q = 0; q < p_.plane_count && device_.type == device_cuda && p_.points < 0; ++q)
      if (p_.planes[q].row_axis > p_.planes[q].column_axis)
        throw py::value_error("plane_axes: expected row axis < column axis for a grid on CUDA");
    empty_ = product(out_shape()) == 0;
  }

  int64_t workspace(bool backward) const {
    if (empty_) return workspace_alignment;
#ifdef TCAM_WITH_CUDA
    if (device_.type == device_cuda) return tcam_decode_cuda_workspace(&p_, backward) + workspace_alignment;
#endif
    return tcam_decode_cpu_workspace(&p_, backward) + workspace_alignment;
  }

  // Which kernels run and why no faster ones do. `output`: 0 the volume, 1 the losses alone, 2 all gradients;
  // `shared_limit`: bytes of shared memory that a block of the CUDA device may have, 0: the CPU; `warpgroups`: whether it runs
  // the kernels with wgmma.
  std::string explain(int output, int shared_limit, bool warpgroups) const {
    between("output", output, 0, 2);
    if (empty_) return "nothing to decode";
    tcam_problem p = p_;
    if (output == 2) p.grad_planes = 1, p.grad_decoder = p.layers > 0;
    std::string text = (p_.points >= 0 ? std::string("points") : grid_way(shared_limit == 0)) + ": ";
    if (shared_limit == 0) {
      text += std::string("compiled for ") + tcam_cpu_isa() + ", ";
      if (p_.compute == TCAM_BF16 && tcam_cpu_has_bf16()) return text + "bfloat16 products";
      text += p_.compute == TCAM_F64 ? "float64 products" : "float32 products";
      if (p_.compute == TCAM_BF16) text += "; not bfloat16 ones: they need AVX512_BF16";
      if (p_.compute == TCAM_F16 || p_.compute == TCAM_TF32) text += "; there are no float16 or TensorFloat-32 ones on a CPU";
      return text;
    }
    (void)warpgroups;
#ifdef TCAM_WITH_CUDA
    char more[400];
    tcam_decode_cuda_explain(&p, output, shared_limit, warpgroups, more, sizeof more);
    return text + more;
#else
    throw std::runtime_error("tcam_ext was built without CUDA; install it where nvcc is found");
#endif
  }

  void forward(py::handle out, py::handle workspace) const {
    const Tensor to = output(out, "out");
    void* scratch = workspace_of(workspace, false);
    const tcam_inputs in = inputs();
    run_on(
        device_, [&] { tcam_decode_cpu(&p_, &in, to.data, scratch); },
        TCAM_ON_CUDA(tcam_decode_cuda(&p_, &in, to.data, scratch, device, stream)));
  }

  void backward(py::handle grad_out, const py::list& planes, const py::list& decoder, py::object points, py::object extra,
                py::handle workspace) const {
    const Tensor grad = output(grad_out, "grad_out");
    const Gradients to(*this, planes, decoder, points, extra, false);
    void* scratch = workspace_of(workspace, true);
    const tcam_inputs in = inputs();
    run_on(
        device_, [&] { tcam_decode_backward_cpu(&p_, grad.data, &in, &to.gradients, scratch); },
        TCAM_ON_CUDA(tcam_decode_backward_cuda(&p_, grad.data, &in, &to.gradients, scratch, device, stream)));
  }

  void loss(py::handle target, int loss, double beta, bool per_object, py::handle losses, const py::list& planes,
            const py::list& decoder, py::object extra, py::handle workspace) const {
    if (p_.points >= 0) throw py::value_error("loss: expected a grid, got points");
    const Tensor want(target, "target"), sums(losses, "losses");
    want.expect("target", out_shape(), want.dtype, device_);
    if (want.dtype > TCAM_U8) throw py::type_error("target: expected a floating dtype, or uint8");
    sums.expect("losses", {p_.batch}, TCAM_F64, device_);
    between("loss", loss, 0, loss_count - 1);
    if (!(beta >= 0)) throw py::value_error("beta: expected a number >= 0");
    const Gradients to(*this, planes, decoder, py::none(), extra, per_object);
    not_empty();
    const tcam_objective objective = {want.data, want.dtype, loss, beta, per_object};
    void* scratch = workspace_of(workspace, loss_wants_gradients(p_));
    const tcam_inputs in = inputs();
    double* to_sums = static_cast<double*>(sums.data);
    run_on(
        device_, [&] { tcam_decode_loss_cpu(&p_, &objective, &in, to_sums, &to.gradients, scratch); },
        TCAM_ON_CUDA(tcam_decode_loss_cuda(&p_, &objective, &in, to_sums, &to.gradients, scratch, device, stream)));
  }

 private:
  // How a grid is decoded, and why not through maps.
  std::string grid_way(bool cpu) const {
    const char* why = not_separable(p_);
    if (!why) {
      int sampled = 0;
      for (int q = 0; cpu && q < p_.plane_count; ++q) sampled += samples_first(p_, q);
      const std::string planes = std::to_string(sampled) + " of " + std::to_string(p_.plane_count) + " planes";
      return "maps over pairs of axes" + (sampled ? ", " + planes + " sampled before they are multiplied by W_1" : "");
    }
    const char* more = nullptr;
    if (cpu && multiplies_maps(p_, &more)) return "maps over pairs of axes, multiplied";
    return std::string("voxel by voxel, as ") + why + (more ? std::string(" and ") + more : "");
  }

  std::array<py::object, 7> kept_;
  tcam_problem p_;
  std::vector<Tensor> planes_, weights_, biases_;
  std::vector<const void*> plane_data_, weight_data_, bias_data_;
  Tensor bounds_, points_, objects_, extra_;
  DLDevice device_{};
  bool empty_ = false;

  void take_planes(const py::list& planes, const Options& o) {
    if (planes.size() < 1 || planes.size() > TCAM_MAX_PLANES)
      throw py::value_error("planes: expected 1 to " + std::to_string(TCAM_MAX_PLANES) + " tensors");
    if (o.plane_axes.size() != planes.size()) throw py::value_error("plane_axes: expected a pair for each plane");
    std::vector<int32_t> group;  // of each plane
    for (int count : o.groups) {
      if (count < 1 || static_cast<size_t>(count) > planes.size() - group.size())
        throw py::value_error("groups: expected numbers of planes that add up to all planes");
      group.insert(group.end(), static_cast<size_t>(count), p_.group_count++);
    }
    if (group.size() != planes.size()) throw py::value_error("groups: expected numbers of planes that add up to all planes");
    for (size_t q = 0; q < planes.size(); ++q) {
      const std::string name = "planes[" + std::to_string(q) + "]";
      planes_.emplace_back(planes[q], name);
      const Tensor& t = planes_[q];
      if (t.shape.size() != 4) throw py::value_error(name + ": expected 4 dimensions");
      if (t.dtype != TCAM_F32 && t.dtype != TCAM_F64) throw py::type_error(name + ": expected float32 or float64");
      const int64_t rows = t.shape[2], columns = t.shape[3];
      t.expect(name, {planes_[0].shape[0], planes_[0].shape[1], rows, columns}, planes_[0].dtype, planes_[0].device);
      if (rows < 1 || columns < 1 || rows > INT32_MAX || columns > INT32_MAX)
        throw py::value_error(name + ": expected 1 to 2^31 - 1 texels on each axis");
      const auto [row_axis, column_axis] = o.plane_axes[q];
      if (std::min(row_axis, column_axis) < 0 || row_axis == column_axis || std::max(row_axis, column_axis) >= p_.axes)
        throw py::value_error("plane_axes: expected two different axes of 0 to axes - 1 for each plane");
      p_.planes[q] = {row_axis, column_axis, group[q], rows, columns};
      plane_data_.push_back(t.data);
    }
    device_ = planes_[0].device;
    p_.dtype = planes_[0].dtype;
    p_.batch = planes_[0].shape[0];
    p_.channels = between("planes: channels", planes_[0].shape[1], int64_t(1), int64_t(TCAM_MAX_WIDTH));
    p_.plane_count = static_cast<int32_t>(planes.size());
  }

  int64_t take_extra(py::handle extra) {
    extra_ = Tensor(extra, "extra");
    if (extra_.shape.size() != 2) throw py::value_error("extra: expected 2 dimensions");
    extra_.expect("extra", extra_.shape, p_.dtype, device_);
    return p_.extra = extra_.shape[1];
  }

  void take_layers(const py::list& weights, const py::list& biases, int64_t extra, const Options& o) {
    if (weights.size() > TCAM_MAX_LAYERS)
      throw py::value_error("weights: expected up to " + std::to_string(TCAM_MAX_LAYERS) + " layers");
    if (biases.size() != weights.size()) throw py::value_error("biases: expected one (or None) for each weight");
    p_.layers = static_cast<int32_t>(weights.size());
    p_.width[0] = p_.group_count * p_.channels + extra;
    for (size_t l = 0; l < weights.size(); ++l) {
      const std::string name = "weights[" + std::to_string(l) + "]";
      weights_.emplace_back(weights[l], name);
      if (weights_[l].shape.size() != 2) throw py::value_error(name + ": expected 2 dimensions");
      const int64_t n = weights_[l].shape[0], most = l + 1 == weights.size() ? int64_t(TCAM_MAX_OUT) : int64_t(TCAM_MAX_WIDTH);
      if (n < 1 || n > most) throw py::value_error(name + ": expected 1 to " + std::to_string(most) + " rows");
      if (l == 1 && !o.skips.empty()) p_.width[1] = between(name.c_str(), weights_[1].shape[1], int64_t(1), p_.first_width);
      weights_[l].expect(name, {n, p_.width[l]}, p_.dtype, device_);
      p_.width[l + 1] = n;
      if (l == 0) p_.first_width = n;
      biases_.push_back(biases[l].is_none() ? Tensor() : Tensor(biases[l], "biases[" + std::to_string(l) + "]"));
      if (!biases[l].is_none()) biases_[l].expect("biases[" + std::to_string(l) + "]", {n}, p_.dtype, device_);
      weight_data_.push_back(weights_[l].data);
      bias_data_.push_back(biases_[l].data);
    }
    int64_t row = p_.width[1];  // the first row of weights[0] that may belong to the next skip
    int before = 1;
    for (const auto& [layer, first] : o.skips) {
      if (layer <= before || layer >= p_.layers || first % TCAM_SKIP_STEP || first < row ||
          p_.width[layer] > p_.first_width - first)
        throw py::value_error("skips: expected ascending hidden layers above the first, and rows of weights[0]");
      p_.skip[layer] = first;
      before = layer, row = first + p_.width[layer];
    }
    if (!o.skips.empty() && row != p_.first_width) throw py::value_error("skips: expected all rows of weights[0]");
    if (o.activation.size() + 1 != std::max<size_t>(weights.size(), 1))
      throw py::value_error("activation: expected one for each hidden layer");
    for (size_t l = 0; l < o.activation.size(); ++l)
      p_.activation[l] = {between("activation", o.activation[l].first, 0, hidden_count - 1), o.activation[l].second};
    p_.output_activation = {between("output_activation", o.output_activation.first, 0, output_count - 1),
                            o.output_activation.second};
  }

  void take_grid(py::handle bounds, const Options& o) {
    if (o.size.size() != 3 || o.box.size() != 6) throw py::value_error("size: expected 3 numbers; box: expected 6");
    if (p_.axes != 3) throw py::value_error("axes: expected 3 for a grid");
    if (!p_.layers) throw py::value_error("weights: expected at least one layer");
    p_.points = -1;
    for (int a = 0; a < 3; ++a) {
      p_.size[a] = o.size[a];
      p_.lo[a] = o.box[2 * a];
      p_.hi[a] = o.box[2 * a + 1];
      if (p_.lo[a] < 0 || p_.hi[a] < p_.lo[a] || p_.hi[a] > p_.size[a] || p_.size[a] > INT32_MAX)
        throw py::value_error("box: expected 0 <= lo <= hi <= size <= 2^31 - 1");
    }
    if (bounds.is_none()) return;
    bounds_ = Tensor(bounds, "bounds");
    bounds_.expect("bounds", {p_.batch, 3, 2}, TCAM_F64, device_);
  }

  void take_points(py::handle points, py::handle objects) {
    points_ = Tensor(points, "points");
    if (points_.shape.size() != 2) throw py::value_error("points: expected 2 dimensions");
    points_.expect("points", {points_.shape[0], p_.axes}, p_.dtype, device_);
    for (const Tensor& t : planes_)  // float32 coordinates cannot resolve more texels
      if (p_.dtype == TCAM_F32 && (t.shape[2] > 1 << 24 || t.shape[3] > 1 << 24))
        throw py::value_error("planes: points take up to 2^24 texels an axis in float32");
    p_.points = points_.shape[0];
    if (p_.points && !p_.batch) throw py::value_error("points: expected none for an empty batch");
    if (objects.is_none()) {
      if (p_.batch && p_.points % p_.batch) throw py::value_error("points: expected the same number for each object");
      return;
    }
    objects_ = Tensor(objects, "batch_index");
    objects_.expect("batch_index", {p_.points}, TCAM_I64, device_);
    if (device_.type != device_cpu) return;  // on a GPU a check would wait for the device; the kernel writes NaN
    for (int64_t i = 0; i < p_.points; ++i)
      if (static_cast<const int64_t*>(objects_.data)[i] < 0 || static_cast<const int64_t*>(objects_.data)[i] >= p_.batch)
        throw py::index_error("batch_index[" + std::to_string(i) + "]: expected 0 to " + std::to_string(p_.batch - 1) +
                              ", got " + std::to_string(static_cast<const int64_t*>(objects_.data)[i]));
  }

  int64_t place_count() const {  // voxels or points decoded
    if (p_.points >= 0) return p_.points;
    return product({p_.batch, p_.hi[0] - p_.lo[0], p_.hi[1] - p_.lo[1], p_.hi[2] - p_.lo[2]});
  }
  Sizes out_shape() const {
    const int64_t features = p_.layers ? p_.width[p_.layers] : p_.width[0];
    if (p_.points >= 0) return {p_.points, features};
    return {p_.batch, features, p_.hi[0] - p_.lo[0], p_.hi[1] - p_.lo[1], p_.hi[2] - p_.lo[2]};
  }
  tcam_inputs inputs() const {
    return {plane_data_.data(), weight_data_.data(),
            bias_data_.data(),  static_cast<const double*>(bounds_.data),
            points_.data,       static_cast<const int64_t*>(objects_.data),
            extra_.data};
  }
  void not_empty() const {
    if (empty_) throw py::value_error("there is nothing to decode");
  }
  Tensor output(py::handle out, const char* name) const {
    Tensor t(out, name);
    t.expect(name, out_shape(), p_.out_dtype, device_);
    not_empty();
    return t;
  }

  void* workspace_of(py::handle workspace, bool backward) const {
    const Tensor t(workspace, "workspace");
    if (t.device.type != device_.type || t.device.id != device_.id || t.dtype != TCAM_U8)
      throw py::value_error("workspace: expected a uint8 tensor on the same device");
    const int64_t bytes = this->workspace(backward);
    if (t.count < bytes) throw py::value_error("workspace: expected at least " + std::to_string(bytes) + " bytes");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data), end = begin + static_cast<uintptr_t>(t.count);
#ifdef __linux__  // huge pages: fewer faults on fresh memory, fewer TLB misses in the tiles
    constexpr uintptr_t huge = uintptr_t(2) << 20;
    const uintptr_t first = (begin + huge - 1) & ~(huge - 1), last = end & ~(huge - 1);
    if (device_.type == device_cpu && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    return reinterpret_cast<void*>((begin + workspace_alignment - 1) & ~(workspace_alignment - 1));
  }

  // The checked tensors that receive gradients; `per_object`: those of the decoder have a leading axis B.
  struct Gradients {
    std::vector<void*> planes, weights, biases;
    tcam_gradients gradients{};

    Gradients(const Call& c, const py::list& grad_planes, const py::list& grad_decoder, py::object points, py::object extra,
              bool per_object) {
      const tcam_problem& p = c.p_;
      auto tensor = [&](py::handle object, const std::string& name, const Tensor& like, bool leading) {
        const Tensor t(object, name);
        Sizes shape = like.shape;
        if (leading) shape.insert(shape.begin(), p.batch);
        t.expect(name, shape, p.dtype, c.device_);
        return t.data;
      };
      if (grad_planes.size() != (p.grad_planes ? c.planes_.size() : 0))
        throw py::value_error("grad_planes: expected a tensor for each plane, or none if they are not wanted");
      for (size_t q = 0; q < grad_planes.size(); ++q)
        planes.push_back(tensor(grad_planes[q], "grad_planes[" + std::to_string(q) + "]", c.planes_[q], false));
      const size_t layers = c.weights_.size();
      if (grad_decoder.size() != (p.grad_decoder ? 2 * layers : 0))
        throw py::value_error("grad_decoder: expected one for each weight, then each bias, or none if they are not wanted");
      for (size_t l = 0; l < grad_decoder.size(); ++l) {
        const bool weight = l < layers;
        const Tensor& like = weight ? c.weights_[l] : c.biases_[l - layers];
        if ((like.data == nullptr) != grad_decoder[l].is_none())
          throw py::value_error("grad_decoder: expected None exactly where there is no bias");
        (weight ? weights : biases)
            .push_back(like.data ? tensor(grad_decoder[l], "grad_decoder[" + std::to_string(l) + "]", like, per_object)
                                 : nullptr);
      }
      weights.resize(layers), biases.resize(layers), planes.resize(c.planes_.size());
      gradients = {planes.data(), weights.data(), biases.data(), nullptr, nullptr};
      if (p.grad_points) gradients.points = tensor(points, "grad_points", c.points_, false);
      if (p.grad_extra) gradients.extra = tensor(extra, "grad_extra", c.extra_, false);
    }
  };
};

}  // namespace tcam
