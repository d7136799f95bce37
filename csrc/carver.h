// A workspace allocator: hands out aligned arrays from one allocation of the caller's. With a null base it only measures: the
// arrays are null, and used() is the size of the allocation that is needed.
#pragma once
#include <stdint.h>

namespace tcam {

class Carver {
 public:
  static constexpr int64_t alignment = 256;

  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  char* take(int64_t bytes) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (bytes + alignment - 1) / alignment * alignment;
    return p;
  }
  template <class T>
  T* array(int64_t count) {
    return reinterpret_cast<T*>(take(count * static_cast<int64_t>(sizeof(T))));
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace tcam
