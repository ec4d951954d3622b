// A tensor (..., C) of logits as rows: any strides, any floating dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace smart_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class Rows {
 public:
  explicit Rows(const Tensor& x)
      : data_(static_cast<const char*>(x.const_data_ptr())),
        dtype_(x.scalar_type()),
        itemsize_(x.element_size()) {
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    const int64_t last = x.dim() - 1;
    cols_ = sizes[last];
    column_stride_ = cols_ > 1 ? strides[last] : 1;
    for (int64_t d = 0; d < last; ++d) {
      rows_ *= sizes[d];
      if (sizes[d] == 1) continue;
      // dimensions that follow each other in memory are one
      if (count_ && dims_[count_ - 1].stride == strides[d] * sizes[d]) {
        dims_[count_ - 1] = {dims_[count_ - 1].size * sizes[d], strides[d]};
      } else {
        STD_TORCH_CHECK(count_ < kMaxDims, "smart_kernels: tensors of more than ", kMaxDims, " dimensions");
        dims_[count_++] = {sizes[d], strides[d]};
      }
    }
    if (!count_) dims_[count_++] = {1, 0};
  }

  // Contiguous ones
  Rows(const void* data, ScalarType dtype, int64_t itemsize, int64_t rows, int64_t cols)
      : data_(static_cast<const char*>(data)), dtype_(dtype), itemsize_(itemsize), rows_(rows), cols_(cols), count_(1) {
    dims_[0] = {rows, cols};
  }

  const void* row(int64_t index) const {
    int64_t offset = 0;
    for (int d = count_; --d > 0;) {
      offset += index % dims_[d].size * dims_[d].stride;
      index /= dims_[d].size;
    }
    return data_ + (offset + index * dims_[0].stride) * itemsize_;
  }

  // Whether the rows follow each other with no gap, each without one
  bool contiguous() const { return column_stride_ == 1 && count_ == 1 && (rows_ == 1 || dims_[0].stride == cols_); }

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t column_stride() const { return column_stride_; }
  ScalarType dtype() const { return dtype_; }
  int64_t itemsize() const { return itemsize_; }

 private:
  struct Dim {
    int64_t size, stride;
  };
  const char* data_;
  ScalarType dtype_;
  int64_t itemsize_;
  int64_t rows_ = 1, cols_ = 1, column_stride_ = 1;
  static constexpr int kMaxDims = 16;
  Dim dims_[kMaxDims];
  int count_ = 0;
};

}  // namespace smart_kernels
