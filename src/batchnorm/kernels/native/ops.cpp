// The kernels as torch operators, through torch's stable ABI: one build serves every torch from
// TORCH_TARGET_VERSION on.
//
// An operator answers "not served" (see kNotServed) rather than raise, and has then changed nothing:
// the caller goes the careful way, which has words for what is wrong, or serves it otherwise.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "types.h"

namespace batchnorm {

void parallel(int parts, void (*body)(void* context, int part), void* context) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) body(context, int(part));
  });
}

}  // namespace batchnorm

namespace {

using batchnorm::Dtype;
using batchnorm::Shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kNotServed = -1;

// More axes than anyone has, and torch allows 64.
constexpr int64_t kMostAxes = 16;

// Elements from which on a second thread is worth waking.
constexpr int64_t kSerial = 32768;

// Limits in use instead of those measured, or -1: for tests, which cannot be as large as the limits.
int64_t serial_elements = -1;
int64_t stream_bytes = -1;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Double: return Dtype::kDouble;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: return Dtype::kOther;
  }
}

int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble: return 8;
    case Dtype::kFloat: return 4;
    default: return 2;
  }
}

// Scratch memory, without a malloc where there are few channels.
struct Doubles {
  double here[256];
  std::unique_ptr<double[]> elsewhere;
  double* data = here;

  explicit Doubles(int64_t count) {
    if (count <= 256) return;
    elsewhere.reset(new double[count]);
    data = elsewhere.get();
  }
};

// A tensor's axes in the order of its memory, and what that makes of it.
struct Layout {
  Shape shape;
  // Those of more than one element, the channel's left out, slowest first.
  int64_t axes[kMostAxes];
  int64_t rank = 0;
};

// False if the tensor has gaps or overlaps.
bool layout_of(const Tensor& x, int64_t channel, Layout& layout) {
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

bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), s = a.strides(), t = b.strides();
  for (int64_t axis = 0; axis < a.dim(); ++axis)
    if (sizes[axis] != 1 && s[axis] != t[axis]) return false;
  return true;
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  const auto s = a.sizes(), t = b.sizes();
  for (int64_t axis = 0; axis < a.dim(); ++axis)
    if (s[axis] != t[axis]) return false;
  return true;
}

// Not torch::stable::empty_like: it finds the operator by its name, 1 µs a call.
Tensor empty(int64_t rank, const int64_t* sizes, const int64_t* strides, Dtype dtype) {
  const int32_t as = dtype == Dtype::kFloat      ? aoti_torch_dtype_float32()
                     : dtype == Dtype::kDouble   ? aoti_torch_dtype_float64()
                     : dtype == Dtype::kBFloat16 ? aoti_torch_dtype_bfloat16()
                                                 : aoti_torch_dtype_float16();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      rank, sizes, strides, as, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_as(const Tensor& t) {
  return empty(t.dim(), t.sizes().data(), t.strides().data(), dtype_of(t));
}

// `t` in the memory order of `x`.
Tensor arranged_like(const Tensor& t, const Tensor& x) {
  if (same_layout(t, x)) return t;
  Tensor copy = empty_as(x);
  torch::stable::copy_(copy, t);
  return copy;
}

bool is_vector(const Tensor& t, int64_t channels) {
  return t.is_cpu() && dtype_of(t) != Dtype::kOther && t.dim() == 1 && t.size(0) == channels &&
         (channels == 1 || t.stride(0) == 1);
}

// Calls body with the tensor's data, typed.
template <class F>
void with_data(const void* data, Dtype dtype, const F& body) {
  using namespace torch::headeronly;
  switch (dtype) {
    case Dtype::kFloat: return body((float*)data);
    case Dtype::kDouble: return body((double*)data);
    case Dtype::kBFloat16: return body((BFloat16*)data);
    default: return body((Half*)data);
  }
}

void read_vector(const Tensor& t, double* to) {
  const int64_t n = t.numel();
  with_data(t.const_data_ptr(), dtype_of(t), [&](const auto* from) {
    for (int64_t c = 0; c < n; ++c) to[c] = double(from[c]);
  });
}

void write_vector(const Tensor& t, const double* from) {
  const int64_t n = t.numel();
  with_data(t.mutable_data_ptr(), dtype_of(t), [&](auto* to) {
    using Element = std::remove_reference_t<decltype(*to)>;
    for (int64_t c = 0; c < n; ++c) to[c] = Element(std::conditional_t<
        std::is_same_v<Element, double>, double, float>(from[c]));
  });
}

// Whether `value` is finite once it is stored in `dtype`.
bool finite_in(double value, Dtype dtype) {
  return dtype == Dtype::kDouble ? std::isfinite(value) : std::isfinite(float(value));
}

// Size of the last-level cache that the first processor uses. Asked once.
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    // Not sysconf: on some processors it counts the caches of all groups of cores together.
    int64_t kilobytes = 0;
    if (FILE* file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      long long found = 0;
      if (fscanf(file, "%lldK", &found) == 1) kilobytes = found;
      fclose(file);
    }
    return kilobytes > 0 ? kilobytes << 10 : int64_t(32) << 20;
  }();
  return bytes;
}

// Writes go past the cache where reading and writing fill most of it, so that what is written does not
// push out what is still to be read. Measured, forward and backward on 2 cores with 32 MB: at 6 MB a
// tensor 0.7 times as fast, at 12 MB 1.2, at 25 MB 1.3.
bool past_cache(const Tensor& x, Dtype dtype) {
  const int64_t limit = stream_bytes >= 0 ? stream_bytes : cache_bytes() / 8 * 3;
  return x.numel() * size_of(dtype) > limit;
}

int parts_for(int64_t elements) {
  const int64_t limit = serial_elements >= 0 ? serial_elements : kSerial;
  return elements < limit ? 1 : int(torch::stable::get_num_threads());
}

// The mask as weights in the order of the tensor's memory, in the precision of computation.
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

// --- the running statistics --------------------------------------------------------------------

// Least total weight behind an update: validation.py's MIN_COUNT.
constexpr double kMinCount = 2;

// torch.lerp's two formulas: each exact at its end.
double lerp(double from, double to, double weight) {
  return weight < 0.5 ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

// Takes the batch's moments in, except in channels where they are not finite (with `together`: in
// none, if there is such a channel). Returns the number of channels left out.
int64_t update_running(const Tensor& mean, const Tensor& var, const double* batch_mean,
                       const double* batch_var, double count, double momentum, bool together) {
  const Dtype mean_dtype = dtype_of(mean), var_dtype = dtype_of(var);
  const int64_t channels = mean.numel();
  const double bessel = count / (count - 1);
  const Doubles values(2 * channels);
  double* new_mean = values.data;
  double* new_var = new_mean + channels;
  read_vector(mean, new_mean);
  read_vector(var, new_var);
  int64_t refused = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const double unbiased = batch_var[c] * bessel;
    if (!finite_in(batch_mean[c], mean_dtype) || !finite_in(unbiased, var_dtype) ||
        !(count >= kMinCount)) {
      ++refused;
      continue;
    }
    new_mean[c] = lerp(new_mean[c], batch_mean[c], momentum);
    new_var[c] = lerp(new_var[c], unbiased, momentum);
  }
  if (together && refused > 0) return channels;
  write_vector(mean, new_mean);
  write_vector(var, new_var);
  return refused;
}

// momentum below 0: a plain average over all batches, this one included.
// The running update alone, by moments that `forward` has given: channels left out, or not served.
int64_t update(Tensor statistics, double count, Tensor running_mean, Tensor running_var,
               Optional counter, double momentum) {
  const double* mean = (const double*)statistics.const_data_ptr();
  const int64_t channels = statistics.size(1);
  const bool average = momentum < 0;
  const int64_t batches = counter ? *(const int64_t*)counter->const_data_ptr() : 0;
  const int64_t refused =
      update_running(running_mean, running_var, mean, mean + channels, count,
                     average ? 1.0 / double(batches + 1) : momentum, average);
  if (counter && refused < channels) *(int64_t*)counter->mutable_data_ptr() = batches + 1;
  return refused;
}

// --- forward -------------------------------------------------------------------------------------

using Served = std::tuple<Tensor, Tensor, double, int64_t>;

// What both directions ask of their arguments first. `channel` becomes the axis itself.
bool fits(const Tensor& x, const Optional& weight, const Optional& bias, double eps,
          int64_t activation, int64_t& channel) {
  const int64_t rank = x.dim();
  if (!x.is_cpu() || rank < 2 || channel < -rank || channel >= rank || x.numel() == 0) return false;
  channel = channel < 0 ? channel + rank : channel;
  const int64_t channels = x.size(channel);
  return rank <= kMostAxes && dtype_of(x) != Dtype::kOther && eps > 0 && eps < std::numeric_limits<double>::infinity() &&
         activation >= 0 && activation <= 2 && (!weight || is_vector(*weight, channels)) &&
         (!bias || is_vector(*bias, channels));
}

// γ and β as doubles; 1 and 0 where there is none.
struct Parameters {
  Doubles values;
  double* gamma;
  double* beta;

  Parameters(const Optional& weight, const Optional& bias, int64_t channels)
      : values(2 * channels), gamma(values.data), beta(gamma + channels) {
    if (weight) read_vector(*weight, gamma);
    else std::fill_n(gamma, channels, 1.0);
    if (bias) read_vector(*bias, beta);
    else std::fill_n(beta, channels, 0.0);
  }
};

constexpr double kLeakySlope = 0.01;  // torch.nn.LeakyReLU's default, as in reference.py

Served forward(Tensor x, Optional weight, Optional bias, Optional residual, Optional mask,
               Optional running_mean, Optional running_var, Optional counter, double momentum,
               double eps, int64_t activation, int64_t channel, bool training, bool later) {
  const Served not_served = {x, x, 0.0, kNotServed};
  if (!fits(x, weight, bias, eps, activation, channel)) return not_served;
  const int64_t channels = x.size(channel);
  const bool has_statistics = running_mean && running_var;
  if (running_mean.has_value() != running_var.has_value() || (!training && !has_statistics) ||
      !(momentum <= 1) || (momentum < 0 && has_statistics && training && !counter))
    return not_served;
  if (has_statistics &&
      (!is_vector(*running_mean, channels) || !is_vector(*running_var, channels) ||
       size_of(dtype_of(*running_mean)) == 2 || size_of(dtype_of(*running_var)) == 2))
    return not_served;
  if (counter && (!counter->is_cpu() || counter->scalar_type() != ScalarType::Long ||
                  counter->numel() != 1))
    return not_served;
  const Dtype dtype = dtype_of(x);
  if (residual && (!residual->is_cpu() || dtype_of(*residual) != dtype || !same_sizes(*residual, x)))
    return not_served;

  Layout layout;
  if (!layout_of(x, channel, layout)) {
    x = torch::stable::clone(x);
    if (!layout_of(x, channel, layout)) return not_served;
  }
  Mask weights;
  const void* mask_data = nullptr;
  double count = 0;
  if (!weights.read(x, layout, dtype, mask, &mask_data, count)) return not_served;
  if (training && (!weights.sound || count < (mask ? kMinCount : 2))) return not_served;

  Tensor y = empty_as(x);
  const int64_t two_rows[] = {2, channels}, row_strides[] = {channels, 1};
  Tensor statistics = empty(2, two_rows, row_strides, Dtype::kDouble);
  double* mean = (double*)statistics.mutable_data_ptr();
  double* var = mean + channels;
  if (!training) read_vector(*running_mean, mean), read_vector(*running_var, var);
  const Tensor added = residual ? arranged_like(*residual, x) : x;
  const Parameters parameters(weight, bias, channels);

  batchnorm::Forward call{};
  call.shape = layout.shape;
  call.x = x.const_data_ptr();
  call.residual = residual ? added.const_data_ptr() : nullptr;
  call.mask = mask_data;
  call.y = y.mutable_data_ptr();
  call.count = count;
  call.mean = mean;
  call.var = var;
  call.gamma = parameters.gamma;
  call.beta = parameters.beta;
  call.eps = eps;
  call.slope = kLeakySlope;
  call.activation = batchnorm::Activation(activation);
  call.training = training;
  call.stream = past_cache(x, dtype);
  call.parts = parts_for(x.numel());
  batchnorm::kernels().forward(dtype, call);

  const bool updates = training && has_statistics && !later;
  return {y, statistics, count,
          updates ? update(statistics, count, *running_mean, *running_var, counter, momentum) : 0};
}

// --- backward ------------------------------------------------------------------------------------

using Gradients = std::tuple<Optional, Optional, Optional, Optional, int64_t>;

Gradients backward(Tensor dy, Tensor x, Optional y, Tensor statistics, Optional weight,
                   Optional bias, Optional mask, double count, double eps, int64_t activation,
                   int64_t channel, bool training, bool want_x, bool want_residual,
                   bool want_parameters) {
  const Gradients not_served = {std::nullopt, std::nullopt, std::nullopt, std::nullopt, kNotServed};
  if (!fits(x, weight, bias, eps, activation, channel)) return not_served;
  const int64_t channels = x.size(channel);
  const Dtype dtype = dtype_of(x);
  if (!dy.is_cpu() || dtype_of(dy) != dtype || !same_sizes(dy, x) || statistics.dim() != 2 ||
      statistics.size(1) != channels || dtype_of(statistics) != Dtype::kDouble)
    return not_served;
  if (y && (!y->is_cpu() || dtype_of(*y) != dtype || !same_sizes(*y, x))) return not_served;

  Layout layout;
  if (!layout_of(x, channel, layout)) {
    x = torch::stable::clone(x);
    if (!layout_of(x, channel, layout)) return not_served;
  }
  Mask weights;
  const void* mask_data = nullptr;
  double total = 0;
  if (!weights.read(x, layout, dtype, mask, &mask_data, total)) return not_served;

  dy = arranged_like(dy, x);
  const Tensor side = y ? arranged_like(*y, x) : x;
  const bool writes_residual = want_residual && (activation != batchnorm::kNone || mask);
  Optional dx, dresidual, dweight, dbias;
  if (want_x) dx = empty_as(x);
  if (writes_residual) dresidual = empty_as(x);
  const Parameters parameters(weight, bias, channels);
  const Doubles sums(2 * channels);
  std::fill_n(sums.data, 2 * channels, 0.0);

  batchnorm::Backward call{};
  call.shape = layout.shape;
  call.dy = dy.const_data_ptr();
  call.x = x.const_data_ptr();
  call.y = y ? side.const_data_ptr() : nullptr;
  call.mask = mask_data;
  call.dx = dx ? dx->mutable_data_ptr() : nullptr;
  call.dresidual = dresidual ? dresidual->mutable_data_ptr() : nullptr;
  call.count = count;
  call.mean = (const double*)statistics.const_data_ptr();
  call.var = call.mean + channels;
  call.gamma = parameters.gamma;
  call.beta = parameters.beta;
  call.dgamma = sums.data;
  call.dbeta = sums.data + channels;
  call.eps = eps;
  call.slope = kLeakySlope;
  call.activation = batchnorm::Activation(activation);
  call.training = training;
  call.sums_given = !training && !want_parameters;
  call.stream = past_cache(x, dtype);
  call.parts = parts_for(x.numel());
  batchnorm::kernels().backward(dtype, call);

  if (want_parameters) {
    const int64_t step = 1;
    const Dtype as = weight ? dtype_of(*weight) : bias ? dtype_of(*bias) : Dtype::kDouble;
    dweight = empty(1, &channels, &step, as);
    dbias = empty(1, &channels, &step, as);
    write_vector(*dweight, call.dgamma);
    write_vector(*dbias, call.dbeta);
  }
  return {dx, dresidual, dweight, dbias, 0};
}

int64_t use(int64_t level, int64_t serial, int64_t stream) {
  serial_elements = serial;
  stream_bytes = stream;
  return batchnorm::use_kernels(int(level));
}

}  // namespace

STABLE_TORCH_LIBRARY(batchnorm, m) {
  m.def(
      "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? counter, float momentum, "
      "float eps, int activation, int channel_dim, bool training, bool later) -> "
      "(Tensor, Tensor, float, int)");
  m.def(
      "update(Tensor statistics, float count, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor(c!)? counter, float momentum) -> int");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? y, Tensor statistics, Tensor? weight, Tensor? bias, "
      "Tensor? mask, float count, float eps, int activation, int channel_dim, bool training, "
      "bool want_x, bool want_residual, bool want_parameters) -> "
      "(Tensor?, Tensor?, Tensor?, Tensor?, int)");
  m.def("use(int level, int serial_elements, int stream_bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("update", TORCH_BOX(&update));
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CompositeExplicitAutograd, m) {
  m.impl("use", TORCH_BOX(&use));
}
