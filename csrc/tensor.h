// Access to torch tensors (pointer, dtype, shape, strides, device, stream) without libtorch, through DLPack's C exchange table
// (DLPack 1.2 ABI, torch >= 2.10).
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace tcam {
namespace py = pybind11;

struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLExchangeHeader {
  uint32_t major, minor;
  DLExchangeHeader* previous;
};
struct DLExchangeApi {
  DLExchangeHeader header;
  void *allocate, *from_py, *to_py;
  int (*dltensor)(void* py_object, DLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

// The structs above have the layout of dlpack.h 1.2 on a 64-bit machine.
static_assert(sizeof(void*) == 8 && sizeof(DLDevice) == 8 && sizeof(DLDataType) == 4, "");
static_assert(offsetof(DLDevice, id) == 4 && offsetof(DLDataType, bits) == 1 && offsetof(DLDataType, lanes) == 2, "");
static_assert(sizeof(DLTensor) == 48 && offsetof(DLTensor, device) == 8 && offsetof(DLTensor, ndim) == 16, "");
static_assert(offsetof(DLTensor, dtype) == 20 && offsetof(DLTensor, shape) == 24 && offsetof(DLTensor, strides) == 32, "");
static_assert(offsetof(DLTensor, byte_offset) == 40, "");
static_assert(sizeof(DLExchangeHeader) == 16 && offsetof(DLExchangeHeader, minor) == 4, "");
static_assert(offsetof(DLExchangeHeader, previous) == 8 && offsetof(DLExchangeApi, allocate) == 16, "");
static_assert(offsetof(DLExchangeApi, dltensor) == 40 && offsetof(DLExchangeApi, current_stream) == 48, "");

constexpr int32_t device_cpu = 1, device_cuda = 2;

class TensorApi {
 public:
  static TensorApi& get() {
    static TensorApi api;
    return api;
  }

  // Binds to torch.Tensor and torch.nn.Parameter, once at import.
  void bind(py::object tensor, py::object parameter) {
    if (!PyType_Check(tensor.ptr()) || !PyType_Check(parameter.ptr())) throw py::type_error("bind: expected two types");
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__"))
      throw std::runtime_error("tcam_ext needs torch >= 2.10 (torch.Tensor.__dlpack_c_exchange_api__ is missing)");
    py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<DLExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    api_ = version_1(api);
    tensor_ = tensor.release().ptr();  // never released
    parameter_ = parameter.release().ptr();
  }

  void view(py::handle object, const std::string& name, DLTensor* out) const {
    if (!api_) throw std::runtime_error("tcam_ext._C is not bound to torch");
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    if (type != tensor_ && type != parameter_)  // exact types: neither FakeTensor nor a subclass with its own storage
      throw py::type_error(name + ": expected a torch.Tensor, got " + Py_TYPE(object.ptr())->tp_name);
    if (api_->dltensor(object.ptr(), out)) throw py::error_already_set();
  }

  void* stream(DLDevice device) const {
    void* s = nullptr;
    if (api_->current_stream(device.type, device.id, &s)) throw py::error_already_set();
    return s;
  }

 private:
  // The table of major version 1: the given one, or an older one in its list.
  static DLExchangeApi* version_1(DLExchangeApi* newest) {
    std::string seen;
    DLExchangeHeader* at = &newest->header;
    for (int n = 0; at && n < 64; ++n, at = at->previous) {
      if (at->major != 1) {
        seen += (seen.empty() ? "" : ", ") + std::to_string(at->major);
        continue;
      }
      auto* api = reinterpret_cast<DLExchangeApi*>(at);
      if (api->dltensor && api->current_stream) return api;
      throw std::runtime_error("tcam_ext: torch's DLPack exchange table of version 1 lacks functions that this build calls");
    }
    throw std::runtime_error("tcam_ext: torch's DLPack exchange tables have major versions " + seen +
                             ", and this build reads version 1; it needs a newer tcam_ext");
  }

  DLExchangeApi* api_ = nullptr;
  PyObject *tensor_ = nullptr, *parameter_ = nullptr;
};

inline const char* dtype_name(int dtype) {
#define TCAM_NAME(constant, name) #name,
  static const char* names[] = {TCAM_DTYPES(TCAM_NAME)};
#undef TCAM_NAME
  return names[dtype];
}

// A checked, contiguous tensor on a CPU or a CUDA device.
struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> shape;
  int64_t count = 1;
  int dtype = TCAM_F32;
  DLDevice device{};

  Tensor() = default;
  Tensor(py::handle object, const std::string& name) {
    DLTensor t;
    TensorApi::get().view(object, name, &t);
    if (t.device.type != device_cpu && t.device.type != device_cuda)
      throw py::value_error(name + ": expected a CPU or a CUDA tensor");
    device = t.device;
    const int kind = (t.dtype.code << 8) | t.dtype.bits;
    switch (t.dtype.lanes == 1 ? kind : 0) {
      case (2 << 8) | 32: dtype = TCAM_F32; break;
      case (2 << 8) | 64: dtype = TCAM_F64; break;
      case (2 << 8) | 16: dtype = TCAM_F16; break;
      case (4 << 8) | 16: dtype = TCAM_BF16; break;
      case (1 << 8) | 8: dtype = TCAM_U8; break;
      case (0 << 8) | 64: dtype = TCAM_I64; break;
      default: throw py::type_error(name + ": expected a floating dtype, uint8 or int64");
    }
    shape.assign(t.shape, t.shape + t.ndim);
    for (int64_t n : shape) count *= n;
    int64_t step = 1;
    for (int d = t.ndim - 1; count && t.strides && d >= 0; --d) {  // a tensor without elements is contiguous, as torch has it
      if (t.shape[d] > 1 && t.strides[d] != step) throw py::value_error(name + ": expected a contiguous tensor");
      step *= t.shape[d];
    }
    data = static_cast<char*>(t.data) + t.byte_offset;
    if (count && !t.data) throw py::value_error(name + ": has no storage");
  }

  void expect(const std::string& name, const std::vector<int64_t>& want, int want_dtype, DLDevice want_device) const {
    if (shape != want) throw py::value_error(name + ": expected shape " + text(want) + ", got " + text(shape));
    if (dtype != want_dtype) throw py::type_error(name + ": expected " + dtype_name(want_dtype) + ", got " + dtype_name(dtype));
    if (device.type != want_device.type || device.id != want_device.id)
      throw py::value_error(name + ": expected all tensors on one device");
  }

  static std::string text(const std::vector<int64_t>& shape) {
    std::string s = "(";
    for (size_t d = 0; d < shape.size(); ++d) s += (d ? ", " : "") + std::to_string(shape[d]);
    return s + ")";
  }
};

}  // namespace tcam
