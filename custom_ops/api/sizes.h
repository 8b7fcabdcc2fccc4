// Sizes or strides of a tensor without an allocation: a call looks at dozens of them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "paddle/common/ddim.h"
#include "paddle/phi/api/all.h"

namespace fastattn::api {

class Sizes {
 public:
  Sizes() = default;
  Sizes(std::initializer_list<int64_t> values) { Assign(values.begin(), values.size()); }
  Sizes(const std::vector<int64_t>& values) { Assign(values.data(), values.size()); }
  Sizes(const int64_t* values, size_t count) { Assign(values, count); }
  explicit Sizes(const common::DDim& dims) { Assign(dims.Get(), static_cast<size_t>(dims.size())); }

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  const int64_t* begin() const { return values_; }
  const int64_t* end() const { return values_ + size_; }
  int64_t operator[](size_t i) const { return values_[i]; }
  int64_t back() const { return values_[size_ - 1]; }
  std::vector<int64_t> ToVector() const { return {begin(), end()}; }

  friend bool operator==(const Sizes& a, const Sizes& b) {
    if (a.size_ != b.size_) return false;
    for (size_t i = 0; i < a.size_; ++i) {
      if (a.values_[i] != b.values_[i]) return false;
    }
    return true;
  }
  friend bool operator!=(const Sizes& a, const Sizes& b) { return !(a == b); }

 private:
  static constexpr size_t kMost = common::DDim::kMaxRank;

  void Assign(const int64_t* values, size_t count) {
    size_ = count < kMost ? count : kMost;  // no tensor has more dimensions
    for (size_t i = 0; i < size_; ++i) values_[i] = values[i];
  }

  int64_t values_[kMost] = {};
  size_t size_ = 0;
};

inline Sizes SizesOf(const paddle::Tensor& tensor) { return Sizes(tensor.dims()); }

// In elements.
inline Sizes StridesOf(const paddle::Tensor& tensor) { return Sizes(tensor.strides()); }

}  // namespace fastattn::api
