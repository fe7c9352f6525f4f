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
#include "groups.h"
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

// From this bit on: samples in a group that has its own statistics, 0 for all in one.
constexpr int kGroupBit = 8;

constexpr double kLeakySlope = 0.01;  // torch.nn.LeakyReLU's default, as in reference.py

Tensor rows_of_doubles(int64_t columns) {
  const int64_t sizes[] = {2, columns}, strides[] = {columns, 1};
  return empty(2, sizes, strides, Dtype::kDouble);
}

bool is_pair(const Tensor& t, int64_t columns) {
  return t.is_cpu() && t.dim() == 2 && t.size(0) == 2 && t.size(1) == columns &&
         t.is_contiguous() && dtype_of(t) == Dtype::kDouble;
}

// What every operator reads: x in an order of memory that the kernels take, and the mask in the same.
struct Operands {
  Tensor x;
  Dtype dtype;
  Layout layout;
  Mask mask;
  const void* mask_data = nullptr;
  double count = 0;  // total weight
  Groups groups;

  explicit Operands(const Tensor& given) : x(given), dtype(dtype_of(given)) {}

  int64_t channels() const { return layout.shape.channels; }

  // Values in a row of statistics: those of each group and, if there are several, of all together.
  int64_t values() const { return (groups.number + (groups.number > 1)) * channels(); }

  // False if they cannot be served.
  bool read(int64_t channel, const Optional& weights, int64_t flags) {
    const int64_t rank = x.dim();
    if (!x.is_cpu() || rank < 2 || rank > kMostAxes || channel < -rank || channel >= rank ||
        x.numel() == 0 || dtype == Dtype::kOther)
      return false;
    channel = channel < 0 ? channel + rank : channel;
    if (!layout_of(x, channel, layout)) {
      x = torch::stable::clone(x);
      if (!layout_of(x, channel, layout)) return false;
    }
    if (!mask.read(x, layout, dtype, weights, &mask_data, count) ||
        !groups.cut(x, channel, flags >> kGroupBit, layout))
      return false;
    groups.weigh(layout.shape, dtype, mask_data);
    return true;
  }

  // False if what the mask counts says nothing of a variance.
  bool enough() const {
    if (!mask.sound || count < kMinCount) return false;
    for (const double weight : groups.counts)
      if (weight < kMinCount) return false;
    return true;
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

// γ and β as doubles; 1 and 0 where there is none. Of all groups, or each group's own.
struct Parameters {
  int64_t channels, gammas, betas;
  Doubles values;
  double* gamma;
  double* beta;

  Parameters(const Optional& weight, const Optional& bias, int64_t channels)
      : channels(channels), gammas(weight ? weight->numel() : channels),
        betas(bias ? bias->numel() : gammas), values(gammas + betas), gamma(values.data),
        beta(gamma + gammas) {
    if (weight) read_vector(*weight, gamma);
    else std::fill_n(gamma, channels, 1.0);
    if (bias) read_vector(*bias, beta);
    else std::fill_n(beta, betas, 0.0);  // as many as of γ: a gradient is asked for
  }

  const double* gamma_of(int64_t group) const {
    return gamma + (gammas == channels ? 0 : group * channels);
  }
  const double* beta_of(int64_t group) const {
    return beta + (betas == channels ? 0 : group * channels);
  }

  static bool fits(const Optional& vector, int64_t channels, int64_t groups) {
    return !vector || is_vector(*vector, channels) || is_vector(*vector, groups * channels);
  }
  static bool fit(const Optional& weight, const Optional& bias, double eps, int64_t flags,
                  const Operands& of) {
    return eps > 0 && eps < std::numeric_limits<double>::infinity() &&
           (flags & kActivation) <= batchnorm::kLeakyRelu &&
           fits(weight, of.channels(), of.groups.number) &&
           fits(bias, of.channels(), of.groups.number);
  }
};

// Calls one(call, group) with the part of `call` that is each group's, on a thread of its own where
// there are enough of them.
template <class Call, class One>
void each_group(const Operands& of, const Call& whole, const One& one) {
  const Groups& groups = of.groups;
  if (groups.number == 1) return one(whole, 0, 0);
  const bool shared = whole.parts > 1 && groups.number >= whole.parts;
  const int64_t bytes = size_of(of.dtype), weight_bytes = of.dtype == Dtype::kDouble ? 8 : 4;
  const auto run = [&](int64_t group) {
    Call call = whole;
    const Shape& shape = of.layout.shape;
    const int64_t first = group * groups.rows;
    call.shape.outer = std::min(groups.rows, shape.outer - first);
    const int64_t at = first * shape.channels * shape.inner * bytes;
    call.x = (const char*)call.x + at;
    if (call.mask) call.mask = (const char*)call.mask + first * shape.inner * weight_bytes;
    call.count = groups.counts[group];
    if (shared || whole.parts == 1) call.parts = 1;
    else call.parts = parts_for(call.shape.outer * shape.channels * shape.inner);
    one(call, group, at);
  };
  if (!shared) {
    for (int64_t group = 0; group < groups.number; ++group) run(group);
    return;
  }
  torch::stable::parallel_for(0, groups.number, 1, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group) run(group);
  });
}

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
  if (!of.read(channel, training ? mask : std::nullopt, flags)) return not_served;
  const int64_t channels = of.channels(), groups = of.groups.number, own = groups * channels;
  if (!Parameters::fit(weight, bias, eps, flags, of) ||
      !fits_running(running_mean, running_var, counter, momentum, training,
                    training ? channels : own) ||
      (residual && !of.alike(*residual)) || (training && !of.enough()))
    return not_served;

  const Tensor y = output_like(of.x);
  const int64_t values = of.values();
  Optional statistics;
  if (flags & kKeep) statistics = rows_of_doubles(values);
  const Doubles unkept(statistics ? 0 : 2 * values);
  double* mean = statistics ? (double*)statistics->mutable_data_ptr() : unkept.data;
  double* var = mean + values;
  if (!training) read_vector(*running_mean, mean), read_vector(*running_var, var);
  const Tensor added = residual ? arranged_like(*residual, of.x) : of.x;
  const Parameters parameters(weight, bias, channels);

  batchnorm::Forward whole{};
  of.describe(whole, residual ? 3 : 2, training);
  whole.residual = residual ? added.const_data_ptr() : nullptr;
  whole.y = y.mutable_data_ptr();
  whole.count = of.count;
  whole.eps = eps;
  whole.activation = batchnorm::Activation(flags & kActivation);
  whole.training = training;
  each_group(of, whole, [&](batchnorm::Forward call, int64_t group, int64_t at) {
    if (call.residual) call.residual = (const char*)call.residual + at;
    call.y = (char*)call.y + at;
    call.mean = mean + group * channels;
    call.var = var + group * channels;
    call.gamma = parameters.gamma_of(group);
    call.beta = parameters.beta_of(group);
    batchnorm::kernels().forward(of.dtype, call);
  });

  if (training && groups > 1) of.groups.pool(mean, var, channels);
  const double* batch_mean = mean + values - channels;
  const double* batch_var = var + values - channels;
  const bool updates = training && running_mean && !(flags & kLater);
  return {y, statistics, of.count,
          updates ? take_in(batch_mean, batch_var, of.count, *running_mean, *running_var, counter,
                            momentum)
                  : 0};
}

// `statistics`: a mean and a biased variance for each channel.
int64_t update(Tensor mean, Tensor var, double count, Tensor running_mean, Tensor running_var,
               Optional counter, double momentum) {
  return take_in((const double*)mean.const_data_ptr(), (const double*)var.const_data_ptr(), count,
                 running_mean, running_var, counter, momentum);
}

// The statistics alone, and the total weight behind them.
std::tuple<Optional, double, int64_t> moments(Tensor given, Optional mask, int64_t channel,
                                              int64_t flags) {
  Operands of(given);
  if (!of.read(channel, mask, flags) || !of.mask.sound || !(of.count > 0)) return {std::nullopt, 0.0, kNotServed};
  if (of.groups.number > 1 && !of.enough()) return {std::nullopt, 0.0, kNotServed};
  const int64_t channels = of.channels(), values = of.values();
  const Tensor statistics = rows_of_doubles(values);
  double* mean = (double*)statistics.mutable_data_ptr();
  double* var = mean + values;

  batchnorm::Forward whole{};
  of.describe(whole, 1, false);
  whole.count = of.count;
  whole.training = true;
  each_group(of, whole, [&](batchnorm::Forward call, int64_t group, int64_t) {
    call.mean = mean + group * channels;
    call.var = var + group * channels;
    batchnorm::kernels().forward(of.dtype, call);
  });
  if (of.groups.number > 1) of.groups.pool(mean, var, channels);
  return {statistics, of.count, 0};
}

// --- backward ------------------------------------------------------------------------------------

// A backward call with all that it reads, in the order of x's memory.
struct Back {
  Operands of;
  Tensor dy, side;
  int64_t own;  // values of all groups
  Doubles sums;
  const double* mean;
  Parameters parameters;
  batchnorm::Backward call{};

  // Reads x and the mask; false if they, or what comes with them, cannot be served.
  static bool fit(Operands& of, int64_t channel, const Optional& mask, const Tensor& dy,
                  const Optional& y, const Tensor& statistics, const Optional& weight,
                  const Optional& bias, double eps, int64_t flags) {
    return of.read(channel, mask, flags) && Parameters::fit(weight, bias, eps, flags, of) &&
           of.alike(dy) && (!y || of.alike(*y)) && is_pair(statistics, of.values());
  }

  Back(Operands operands, const Tensor& given_dy, const Optional& y, const Tensor& statistics,
       const Optional& weight, const Optional& bias, const Optional& given_sums, double count,
       double eps, int64_t flags, bool writes_residual)
      : of(std::move(operands)), dy(arranged_like(given_dy, of.x)),
        side(y ? arranged_like(*y, of.x) : of.x), own(of.groups.number * of.channels()),
        sums(2 * own), mean((const double*)statistics.const_data_ptr()),
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
    call.eps = eps;
    call.activation = batchnorm::Activation(flags & kActivation);
    call.training = flags & kTraining;
    if (given_sums)
      std::copy_n((const double*)given_sums->const_data_ptr(), 2 * own, sums.data);
    else
      std::fill_n(sums.data, 2 * own, 0.0);
  }

  void run() {
    const int64_t channels = of.channels();
    each_group(of, call, [&](batchnorm::Backward part, int64_t group, int64_t at) {
      const int64_t values = group * channels;
      part.dy = (const char*)part.dy + at;
      if (part.y) part.y = (const char*)part.y + at;
      if (part.dx) part.dx = (char*)part.dx + at;
      if (part.dresidual) part.dresidual = (char*)part.dresidual + at;
      part.mean = mean + values;
      part.var = mean + of.values() + values;
      part.gamma = parameters.gamma_of(group);
      part.beta = parameters.beta_of(group);
      part.dbeta = sums.data + values;
      part.dgamma = sums.data + own + values;
      batchnorm::kernels().backward(of.dtype, part);
    });
  }

  // The gradient of a parameter that has `size` values: each group's, or their sum.
  void write(const Tensor& to, const double* from) const {
    if (to.numel() == own) return write_vector(to, from);
    const int64_t channels = of.channels();
    const Doubles total(channels);
    std::copy_n(from, channels, total.data);
    for (int64_t k = channels; k < own; ++k) total.data[k % channels] += from[k];
    write_vector(to, total.data);
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
  // There is a residual, so y tells the activation's side.
  if ((flags & kWantResidual) && (flags & kActivation) && !y) return not_served;
  const int64_t channels = of.channels();
  if (sums && !is_pair(*sums, of.groups.number * channels)) return not_served;

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
  back.run();

  if (flags & kWantParameters) {
    const int64_t step = 1;
    const Dtype as = weight ? dtype_of(*weight) : bias ? dtype_of(*bias) : Dtype::kDouble;
    dweight = empty(1, &back.parameters.gammas, &step, as);
    dbias = empty(1, &back.parameters.betas, &step, as);
    back.write(*dweight, back.sums.data + back.own);
    back.write(*dbias, back.sums.data);
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
  const int64_t wanted = (flags & (kActivation | kTraining)) | kWantParameters |
                         (flags >> kGroupBit << kGroupBit);
  Back back(std::move(of), dy, y, statistics, weight, bias, std::nullopt, count, eps, wanted, false);
  back.run();
  const Tensor sums = rows_of_doubles(back.own);
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
      "update(Tensor mean, Tensor var, float count, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor(c!)? counter, float momentum) -> int");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? y, Tensor statistics, Tensor? weight, Tensor? bias, "
      "Tensor? mask, Tensor? sums, float count, float eps, int channel_dim, int flags) -> "
      "(Tensor?, Tensor?, Tensor?, Tensor?, int)");
  m.def("moments(Tensor x, Tensor? mask, int channel_dim, int flags) -> (Tensor?, float, int)");
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
