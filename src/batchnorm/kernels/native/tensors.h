// torch's tensors, as the operators see them: dtypes, memory order, vectors of one value a channel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <type_traits>

#include "types.h"

namespace {

using batchnorm::Dtype;
using batchnorm::Shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Calls with more axes are not served; torch allows 64.
constexpr int64_t kMostAxes = 16;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Double: return Dtype::kDouble;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: return Dtype::kOther;
  }
}

inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble: return 8;
    case Dtype::kFloat: return 4;
    default: return 2;
  }
}

// Scratch memory, without a malloc up to 256 channels: beyond, a call takes too long for it to matter.
struct Doubles {
  static constexpr int64_t kHere = 512;
  double here[kHere];
  std::unique_ptr<double[]> elsewhere;
  double* data = here;

  explicit Doubles(int64_t count) {
    if (count <= kHere) return;
    elsewhere.reset(new double[count]);
    data = elsewhere.get();
  }
  Doubles(const Doubles&) = delete;
};

// A tensor's axes in the order of its memory, and what that makes of it.
struct Layout {
  Shape shape;
  // Those of more than one element, the channel's left out, slowest first.
  int64_t axes[kMostAxes];
  int64_t rank = 0;
};

// False if the tensor has gaps or overlaps.
inline bool layout_of(const Tensor& x, int64_t channel, Layout& layout) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t order[kMostAxes], count = 0;
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    if (sizes[axis] == 1) continue;
    int64_t at = count++;
    for (; at > 0 && strides[order[at - 1]] < strides[axis]; --at) order[at] = order[at - 1];
    order[at] = axis;
  }
  int64_t expected = 1, inner = 1, outer = 1;
  bool outside = false;  // of the channel axis; with one channel all memory is one run
  for (int64_t at = count; at-- > 0;) {
    const int64_t axis = order[at];
    if (strides[axis] != expected) return false;
    expected *= sizes[axis];
    if (axis == channel) outside = true;
    else (outside ? outer : inner) *= sizes[axis];
  }
  layout.shape = {outer, sizes[channel], inner};
  layout.rank = 0;
  for (int64_t at = 0; at < count; ++at)
    if (order[at] != channel) layout.axes[layout.rank++] = order[at];
  return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), s = a.strides(), t = b.strides();
  for (int64_t axis = 0; axis < a.dim(); ++axis)
    if (sizes[axis] != 1 && s[axis] != t[axis]) return false;
  return true;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  const auto s = a.sizes(), t = b.sizes();
  for (int64_t axis = 0; axis < a.dim(); ++axis)
    if (s[axis] != t[axis]) return false;
  return true;
}

// Not torch::stable::empty_like: it finds the operator by its name, 1 µs a call.
inline Tensor empty(int64_t rank, const int64_t* sizes, const int64_t* strides, Dtype dtype) {
  const int32_t as = dtype == Dtype::kFloat      ? aoti_torch_dtype_float32()
                     : dtype == Dtype::kDouble   ? aoti_torch_dtype_float64()
                     : dtype == Dtype::kBFloat16 ? aoti_torch_dtype_bfloat16()
                                                 : aoti_torch_dtype_float16();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      rank, sizes, strides, as, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_as(const Tensor& t) {
  return empty(t.dim(), t.sizes().data(), t.strides().data(), dtype_of(t));
}

// `t` in the memory order of `x`.
inline Tensor arranged_like(const Tensor& t, const Tensor& x) {
  if (same_layout(t, x)) return t;
  Tensor copy = empty_as(x);
  torch::stable::copy_(copy, t);
  return copy;
}

inline bool is_vector(const Tensor& t, int64_t channels) {
  return t.is_cpu() && dtype_of(t) != Dtype::kOther && t.dim() == 1 && t.size(0) == channels &&
         (channels == 1 || t.stride(0) == 1);
}

// Calls body with the tensor's data, typed.
template <class F>
inline void with_data(const void* data, Dtype dtype, const F& body) {
  using namespace torch::headeronly;
  switch (dtype) {
    case Dtype::kFloat: return body((float*)data);
    case Dtype::kDouble: return body((double*)data);
    case Dtype::kBFloat16: return body((BFloat16*)data);
    default: return body((Half*)data);
  }
}

inline void read_vector(const Tensor& t, double* to) {
  const int64_t n = t.numel();
  with_data(t.const_data_ptr(), dtype_of(t), [&](const auto* from) {
    for (int64_t c = 0; c < n; ++c) to[c] = double(from[c]);
  });
}

inline void write_vector(const Tensor& t, const double* from) {
  const int64_t n = t.numel();
  with_data(t.mutable_data_ptr(), dtype_of(t), [&](auto* to) {
    using Element = std::remove_reference_t<decltype(*to)>;
    for (int64_t c = 0; c < n; ++c) to[c] = Element(std::conditional_t<
        std::is_same_v<Element, double>, double, float>(from[c]));
  });
}

}  // namespace
