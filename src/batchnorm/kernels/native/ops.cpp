// The kernels as torch operators, through torch's stable ABI: one build serves every torch from
// TORCH_TARGET_VERSION on.
//
// An operator answers "not served" (see kNotServed) rather than raising, and has then changed nothing:
// the caller goes the careful way, which has words for what is wrong, or serves it otherwise.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "dispatch.h"
#include "masks.h"
#include "resources.h"
#include "running.h"

namespace batchnorm {

void parallel(int parts, void (*body)(void* context, int part), void* context) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) body(context, int(part));
  });
}

}  // namespace batchnorm

namespace {

constexpr int64_t kNotServed = -1;

// What a call is asked for, in one number: each argument of an operator costs 0.14 µs. The lowest two
// bits are the activation. native/__init__.py has the same.
enum Flags : int64_t {
  kActivation = 3,
  kTraining = 4,
  kLater = 8,        // forward: the running update is a separate call
  kKeep = 16,        // forward: the statistics are wanted
  kWantX = 8,        // backward: which gradients are
  kWantResidual = 16,
  kWantParameters = 32,
};

constexpr double kLeakySlope = 0.01;  // torch.nn.LeakyReLU's default, as in reference.py

Tensor statistics_of(int64_t channels) {
  const int64_t sizes[] = {2, channels}, strides[] = {channels, 1};
  return empty(2, sizes, strides, Dtype::kDouble);
}

// What every operator reads: x in an order of memory that the kernels take, and the mask in the same.
struct Operands {
  Tensor x;
  Dtype dtype;
  Layout layout;
  Mask mask;
  const void* mask_data = nullptr;
  double count = 0;  // total weight

  explicit Operands(const Tensor& given) : x(given), dtype(dtype_of(given)) {}

  int64_t channels() const { return layout.shape.channels; }

  // False if they cannot be served.
  bool read(int64_t channel, const Optional& weights) {
    const int64_t rank = x.dim();
    if (!x.is_cpu() || rank < 2 || rank > kMostAxes || channel < -rank || channel >= rank ||
        x.numel() == 0 || dtype == Dtype::kOther)
      return false;
    channel = channel < 0 ? channel + rank : channel;
    if (!layout_of(x, channel, layout)) {
      x = torch::stable::clone(x);
      if (!layout_of(x, channel, layout)) return false;
    }
    return mask.read(x, layout, dtype, weights, &mask_data, count);
  }

  int64_t bytes() const { return x.numel() * size_of(dtype); }

  bool alike(const Tensor& t) const {
    return t.is_cpu() && dtype_of(t) == dtype && same_sizes(t, x);
  }

  // What both directions tell the kernels; `tensors` is how many like x they read and write.
  template <class Call>
  void describe(Call& call, int tensors, bool reads_twice) const {
    call.shape = layout.shape;
    call.x = x.const_data_ptr();
    call.mask = mask_data;
    call.slope = kLeakySlope;
    call.stream = past_cache(tensors * bytes(), reads_twice, layout.shape.inner == 1);
    call.parts = parts_for(x.numel());
  }
};

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

  static bool fit(const Optional& weight, const Optional& bias, double eps, int64_t flags,
                  int64_t channels) {
    return eps > 0 && eps < std::numeric_limits<double>::infinity() &&
           (flags & kActivation) <= batchnorm::kLeakyRelu &&
           (!weight || is_vector(*weight, channels)) && (!bias || is_vector(*bias, channels));
  }
};

// --- forward -------------------------------------------------------------------------------------

// Whether the running statistics may be read and changed here.
bool fits_running(const Optional& mean, const Optional& var, const Optional& counter,
                  double momentum, bool training, int64_t channels) {
  if (mean.has_value() != var.has_value() || !(momentum <= 1)) return false;
  if (counter && (!counter->is_cpu() || counter->scalar_type() != ScalarType::Long ||
                  counter->numel() != 1))
    return false;
  if (!mean) return training;
  return is_vector(*mean, channels) && is_vector(*var, channels) &&
         size_of(dtype_of(*mean)) > 2 && size_of(dtype_of(*var)) > 2 &&
         (momentum >= 0 || !training || counter);
}

using Served = std::tuple<Tensor, Optional, double, int64_t>;

Served forward(Tensor given, Optional weight, Optional bias, Optional residual, Optional mask,
               Optional running_mean, Optional running_var, Optional counter, double momentum,
               double eps, int64_t channel, int64_t flags) {
  const Served not_served = {given, std::nullopt, 0.0, kNotServed};
  const bool training = flags & kTraining;
  Operands of(given);
  // In evaluation nothing depends on it.
  if (!of.read(channel, training ? mask : std::nullopt)) return not_served;
  const int64_t channels = of.channels();
  if (!Parameters::fit(weight, bias, eps, flags, channels) ||
      !fits_running(running_mean, running_var, counter, momentum, training, channels) ||
      (residual && !of.alike(*residual)) ||
      (training && (!of.mask.sound || of.count < kMinCount)))
    return not_served;

  const Tensor y = output_like(of.x);
  Optional statistics;
  if (flags & kKeep) statistics = statistics_of(channels);
  const Doubles unkept(statistics ? 0 : 2 * channels);
  double* mean = statistics ? (double*)statistics->mutable_data_ptr() : unkept.data;
  double* var = mean + channels;
  if (!training) read_vector(*running_mean, mean), read_vector(*running_var, var);
  const Tensor added = residual ? arranged_like(*residual, of.x) : of.x;
  const Parameters parameters(weight, bias, channels);

  batchnorm::Forward call{};
  of.describe(call, residual ? 3 : 2, training);
  call.residual = residual ? added.const_data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  call.count = of.count;
  call.mean = mean;
  call.var = var;
  call.gamma = parameters.gamma;
  call.beta = parameters.beta;
  call.eps = eps;
  call.activation = batchnorm::Activation(flags & kActivation);
  call.training = training;
  batchnorm::kernels().forward(of.dtype, call);

  const bool updates = training && running_mean && !(flags & kLater);
  return {y, statistics, of.count,
          updates ? take_in(mean, var, of.count, *running_mean, *running_var, counter, momentum)
                  : 0};
}

int64_t update(Tensor statistics, double count, Tensor running_mean, Tensor running_var,
               Optional counter, double momentum) {
  const double* mean = (const double*)statistics.const_data_ptr();
  return take_in(mean, mean + statistics.size(1), count, running_mean, running_var, counter,
                 momentum);
}

// The statistics alone, and the total weight behind them.
std::tuple<Optional, double, int64_t> moments(Tensor given, Optional mask, int64_t channel) {
  Operands of(given);
  if (!of.read(channel, mask) || !of.mask.sound || !(of.count > 0))
    return {std::nullopt, 0.0, kNotServed};
  const int64_t channels = of.channels();
  const Tensor statistics = statistics_of(channels);

  batchnorm::Forward call{};
  of.describe(call, 1, false);
  call.count = of.count;
  call.mean = (double*)statistics.mutable_data_ptr();
  call.var = call.mean + channels;
  call.training = true;
  batchnorm::kernels().forward(of.dtype, call);
  return {statistics, of.count, 0};
}

// --- backward ------------------------------------------------------------------------------------

// A backward call with all that it reads, in the order of x's memory.
struct Back {
  Operands of;
  Tensor dy, side;
  Doubles sums;
  Parameters parameters;
  batchnorm::Backward call{};

  // Two rows of doubles, one value a channel.
  static bool is_pair(const Tensor& t, int64_t channels) {
    return t.is_cpu() && t.dim() == 2 && t.size(0) == 2 && t.size(1) == channels &&
           t.is_contiguous() && dtype_of(t) == Dtype::kDouble;
  }

  // Reads x and the mask; false if they, or what comes with them, cannot be served.
  static bool fit(Operands& of, int64_t channel, const Optional& mask, const Tensor& dy,
                  const Optional& y, const Tensor& statistics, const Optional& weight,
                  const Optional& bias, double eps, int64_t flags) {
    return of.read(channel, mask) && Parameters::fit(weight, bias, eps, flags, of.channels()) &&
           of.alike(dy) && (!y || of.alike(*y)) && is_pair(statistics, of.channels());
  }

  Back(Operands operands, const Tensor& given_dy, const Optional& y, const Tensor& statistics,
       const Optional& weight, const Optional& bias, const Optional& given_sums, double count,
       double eps, int64_t flags, bool writes_residual)
      : of(std::move(operands)), dy(arranged_like(given_dy, of.x)),
        side(y ? arranged_like(*y, of.x) : of.x), sums(2 * of.channels()),
        parameters(weight, bias, of.channels()) {
    const bool sums_wanted = flags & (kTraining | kWantParameters);
    const int tensors = 2 + bool(y) + bool(flags & kWantX) + writes_residual;
    of.describe(call, tensors, sums_wanted && !given_sums);
    // What the first pass writes, the second reads: so it goes past the cache only from four times
    // the usual size on. Measured, bn+add+relu of channels-last float32, 2 cores with 32 MB, time
    // without by time with: 0.9 at 32 MB in all, 1.0 at 64, 1.15 at 128.
    call.stream_early = past_cache(tensors * of.bytes() / 4, true, true);
    call.sums_given = given_sums || !sums_wanted;
    call.dy = dy.const_data_ptr();
    call.y = y ? side.const_data_ptr() : nullptr;
    call.count = count;
    call.mean = (const double*)statistics.const_data_ptr();
    call.var = call.mean + of.channels();
    call.gamma = parameters.gamma;
    call.beta = parameters.beta;
    call.eps = eps;
    call.activation = batchnorm::Activation(flags & kActivation);
    call.training = flags & kTraining;
    call.dbeta = sums.data;
    call.dgamma = sums.data + of.channels();
    if (given_sums)
      std::copy_n((const double*)given_sums->const_data_ptr(), 2 * of.channels(), sums.data);
    else
      std::fill_n(sums.data, 2 * of.channels(), 0.0);
  }
  Back(const Back&) = delete;
};

using Gradients = std::tuple<Optional, Optional, Optional, Optional, int64_t>;

Gradients backward(Tensor dy, Tensor x, Optional y, Tensor statistics, Optional weight,
                   Optional bias, Optional mask, Optional sums, double count, double eps,
                   int64_t channel, int64_t flags) {
  const Gradients not_served = {std::nullopt, std::nullopt, std::nullopt, std::nullopt, kNotServed};
  Operands of(x);
  if (!Back::fit(of, channel, mask, dy, y, statistics, weight, bias, eps, flags)) return not_served;
  const int64_t channels = of.channels();
  // There is a residual, so y tells the activation's side.
  if ((flags & kWantResidual) && (flags & kActivation) && !y) return not_served;
  if (sums && !Back::is_pair(*sums, channels)) return not_served;

  // Without an activation or a mask it is dy itself.
  const bool writes_residual = (flags & kWantResidual) && ((flags & kActivation) || mask);
  Back back(std::move(of), dy, y, statistics, weight, bias, sums, count, eps, flags,
            writes_residual);
  batchnorm::Backward& call = back.call;
  Optional dx, dresidual, dweight, dbias;
  if (flags & kWantX) dx = output_like(back.of.x);
  if (writes_residual) dresidual = output_like(back.of.x);
  call.dx = dx ? dx->mutable_data_ptr() : nullptr;
  call.dresidual = dresidual ? dresidual->mutable_data_ptr() : nullptr;
  batchnorm::kernels().backward(back.of.dtype, call);

  if (flags & kWantParameters) {
    const int64_t step = 1;
    const Dtype as = weight ? dtype_of(*weight) : bias ? dtype_of(*bias) : Dtype::kDouble;
    dweight = empty(1, &channels, &step, as);
    dbias = empty(1, &channels, &step, as);
    write_vector(*dweight, call.dgamma);
    write_vector(*dbias, call.dbeta);
  }
  return {dx, dresidual, dweight, dbias, 0};
}

// The first half alone: Σ dz and Σ dz·x̂ of each channel, for `backward` to be given.
std::tuple<Optional, int64_t> backward_reduce(Tensor dy, Tensor x, Optional y, Tensor statistics,
                                              Optional weight, Optional bias, Optional mask,
                                              double eps, int64_t channel, int64_t flags) {
  Operands of(x);
  if (!Back::fit(of, channel, mask, dy, y, statistics, weight, bias, eps, flags))
    return {std::nullopt, kNotServed};
  const double count = of.count;
  const int64_t wanted = (flags & (kActivation | kTraining)) | kWantParameters;
  Back back(std::move(of), dy, y, statistics, weight, bias, std::nullopt, count, eps, wanted, false);
  batchnorm::kernels().backward(back.of.dtype, back.call);
  const Tensor sums = statistics_of(back.of.channels());
  std::copy_n(back.sums.data, sums.numel(), (double*)sums.mutable_data_ptr());
  return {sums, 0};
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
      "float eps, int channel_dim, int flags) -> (Tensor, Tensor?, float, int)");
  m.def(
      "update(Tensor statistics, float count, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor(c!)? counter, float momentum) -> int");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? y, Tensor statistics, Tensor? weight, Tensor? bias, "
      "Tensor? mask, Tensor? sums, float count, float eps, int channel_dim, int flags) -> "
      "(Tensor?, Tensor?, Tensor?, Tensor?, int)");
  m.def("moments(Tensor x, Tensor? mask, int channel_dim) -> (Tensor?, float, int)");
  m.def(
      "backward_reduce(Tensor dy, Tensor x, Tensor? y, Tensor statistics, Tensor? weight, "
      "Tensor? bias, Tensor? mask, float eps, int channel_dim, int flags) -> (Tensor?, int)");
  m.def("use(int level, int serial_elements, int stream_bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("update", TORCH_BOX(&update));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("backward_reduce", TORCH_BOX(&backward_reduce));
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CompositeExplicitAutograd, m) {
  m.impl("use", TORCH_BOX(&use));
}
