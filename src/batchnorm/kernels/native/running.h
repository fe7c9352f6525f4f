// The running statistics take a batch's moments in, in place.
#pragma once

#include <cmath>

#include "tensors.h"

namespace {

// Least total weight behind an update: validation.py's MIN_COUNT.
constexpr double kMinCount = 2;

// torch.lerp's two formulas: each exact at its end.
inline double lerp(double from, double to, double weight) {
  return weight < 0.5 ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

// Whether `value` is finite once it is stored in `dtype`.
inline bool finite_in(double value, Dtype dtype) {
  return dtype == Dtype::kDouble ? std::isfinite(value) : std::isfinite(float(value));
}

// Takes the batch's moments in, except in channels where they are not finite (with `together`: in
// none, if there is such a channel). Returns the number of channels left out.
inline int64_t update_running(const Tensor& mean, const Tensor& var, const double* batch_mean,
                              const double* batch_var, double count, double momentum,
                              bool together) {
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

// Takes the batch's moments in, and counts the batch; returns the number of channels left out. A
// momentum below 0 asks for the plain average over all batches, this one included.
inline int64_t take_in(const double* mean, const double* var, double count,
                       const Tensor& running_mean, const Tensor& running_var,
                       const Optional& counter, double momentum) {
  const bool average = momentum < 0;
  const int64_t batches = counter ? *(const int64_t*)counter->const_data_ptr() : 0;
  const int64_t refused =
      update_running(running_mean, running_var, mean, var, count,
                     average ? 1.0 / double(batches + 1) : momentum, average);
  if (counter && refused < running_mean.numel())
    *(int64_t*)counter->mutable_data_ptr() = batches + 1;
  return refused;
}

}  // namespace
