// A mask as weights in the order of a tensor's memory, in the precision of computation.
#pragma once

#include <limits>
#include <vector>

#include "tensors.h"

namespace {

template <class S>
struct Weights {
  std::vector<S> values;
  double total = 0;
  bool sound = true;  // all finite and none negative
};

template <class S, class M>
void fill_weights(const Tensor& x, const Layout& layout, const Tensor& mask, Weights<S>& weights) {
  const auto sizes = x.sizes(), strides = mask.strides();
  int64_t index[kMostAxes] = {};
  const M* at = (const M*)mask.const_data_ptr();
  weights.values.resize(layout.shape.outer * layout.shape.inner);
  for (S& value : weights.values) {
    // A bool may be any byte but 0.
    value = std::is_same_v<M, uint8_t> ? S(*at != 0) : S(*at);
    weights.total += double(value);
    weights.sound &= value >= 0 && value <= std::numeric_limits<S>::max();
    for (int64_t k = layout.rank; k-- > 0;) {
      const int64_t axis = layout.axes[k];
      at += strides[axis];
      if (++index[k] < sizes[axis]) break;
      at -= strides[axis] * sizes[axis];
      index[k] = 0;
    }
  }
}

// False if the mask's dtype is none of those read here. `mask` has the sizes of x, but 1 channel.
template <class S>
bool weights_of(const Tensor& x, const Layout& layout, const Tensor& mask, Weights<S>& weights) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool: fill_weights<S, uint8_t>(x, layout, mask, weights); return true;
    case ScalarType::Float: fill_weights<S, float>(x, layout, mask, weights); return true;
    case ScalarType::Double: fill_weights<S, double>(x, layout, mask, weights); return true;
    default: return false;
  }
}

struct Mask {
  Weights<float> narrow;
  Weights<double> wide;
  bool sound = true;

  // Null, and the number of elements as `total`, without a mask; false if it cannot be served.
  bool read(const Tensor& x, const Layout& layout, Dtype dtype, const Optional& mask,
            const void** data, double& total) {
    total = double(layout.shape.outer) * double(layout.shape.inner);
    if (!mask) return true;
    if (!mask->is_cpu() || mask->dim() != x.dim()) return false;
    for (int64_t k = 0; k < layout.rank; ++k)
      if (mask->size(layout.axes[k]) != x.size(layout.axes[k])) return false;
    if (dtype == Dtype::kDouble) {
      if (!weights_of(x, layout, *mask, wide)) return false;
      *data = wide.values.data(), total = wide.total, sound = wide.sound;
    } else {
      if (!weights_of(x, layout, *mask, narrow)) return false;
      *data = narrow.values.data(), total = narrow.total, sound = narrow.sound;
    }
    return true;
  }
};

}  // namespace
