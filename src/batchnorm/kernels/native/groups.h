// Groups of samples with statistics of their own, one after the other in memory.
#pragma once

#include <algorithm>
#include <vector>

#include "masks.h"

namespace {

struct Groups {
  int64_t number = 1;
  int64_t rows = 0;            // outer indices of each; the last may have fewer
  std::vector<double> counts;  // total weights; none where there is one group

  // False if they would not lie together: the samples' axis, the first, must be the slowest.
  bool cut(const Tensor& x, int64_t channel, int64_t size, Layout& layout) {
    const int64_t samples = x.size(0);
    if (size <= 0 || (size >= samples && channel != 0)) return true;
    if (channel == 0 || layout.axes[0] != 0) return false;
    Shape& shape = layout.shape;
    // All memory is one run of a single channel's elements.
    if (shape.channels == 1) shape = {samples, 1, shape.outer * shape.inner / samples};
    if (shape.outer % samples != 0) return false;
    rows = shape.outer / samples * size;
    number = (samples + size - 1) / size;
    return true;
  }

  // Finds the counts.
  void weigh(const Shape& shape, Dtype dtype, const void* mask) {
    if (number == 1) return;
    counts.assign(number, 0);
    for (int64_t group = 0; group < number; ++group) {
      const int64_t from = group * rows * shape.inner;
      const int64_t to = std::min((group + 1) * rows, shape.outer) * shape.inner;
      if (!mask) counts[group] = double(to - from);
      else if (dtype == Dtype::kDouble)
        for (int64_t k = from; k < to; ++k) counts[group] += ((const double*)mask)[k];
      else
        for (int64_t k = from; k < to; ++k) counts[group] += double(((const float*)mask)[k]);
    }
  }

  // Writes mean and biased variance of all groups together behind theirs (Chan's formula).
  void pool(double* mean, double* var, int64_t channels) const {
    double total = 0;
    for (const double count : counts) total += count;
    double* all_mean = mean + number * channels;
    double* all_var = var + number * channels;
    for (int64_t c = 0; c < channels; ++c) all_mean[c] = all_var[c] = 0;
    for (int64_t group = 0; group < number; ++group)
      for (int64_t c = 0; c < channels; ++c)
        all_mean[c] += counts[group] / total * mean[group * channels + c];
    for (int64_t group = 0; group < number; ++group)
      for (int64_t c = 0; c < channels; ++c) {
        const double away = mean[group * channels + c] - all_mean[c];
        all_var[c] += counts[group] / total * (var[group * channels + c] + away * away);
      }
  }
};

}  // namespace
