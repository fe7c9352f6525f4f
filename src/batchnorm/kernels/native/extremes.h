// Channels whose numbers float cannot hold (|mean| > 10³⁷, or σ > 10³⁵), each again in double.
//
// The fast passes have written infinities or zeros there. Nothing is gained by being quick about it.
#pragma once

#include "backward.h"

namespace {

constexpr double kExtremeMean = 1e37;
constexpr double kExtremeVar = 1e70;
inline bool extreme(double mean, double var, float) {
  return fabs(mean) > kExtremeMean || var > kExtremeVar;
}
inline bool extreme(double, double, double) { return false; }

template <class F>
inline void each_element(const Shape& shape, int64_t c, const F& body) {
  for (int64_t o = 0; o < shape.outer; ++o)
    for (int64_t i = 0; i < shape.inner; ++i)
      body((o * shape.channels + c) * shape.inner + i, o * shape.inner + i);
}

inline double left_side(double value, batchnorm::Activation a, double slope) {
  return a == batchnorm::kRelu ? 0.0 : value * slope;
}

template <class T>
void forward_extremes(const Forward& f) {
  typedef typename Pack<T>::S S;
  if (!f.y) return;
  for (int64_t c = 0; c < f.shape.channels; ++c) {
    if (!extreme(f.mean[c], f.var[c], S())) continue;
    const double scale = f.gamma[c] / sqrt(f.var[c] + f.eps);
    each_element(f.shape, c, [&](int64_t at, int64_t) {
      double z = (double(read((const T*)f.x + at)) - f.mean[c]) * scale + f.beta[c];
      if (f.residual) z += double(read((const T*)f.residual + at));
      if (f.activation != batchnorm::kNone && z < 0) z = left_side(z, f.activation, f.slope);
      write((T*)f.y + at, S(z));
    });
  }
}

template <class T>
void backward_extremes(const Backward& b) {
  typedef typename Pack<T>::S S;
  for (int64_t c = 0; c < b.shape.channels; ++c) {
    if (!extreme(b.mean[c], b.var[c], S())) continue;
    const double gamma = b.gamma[c], beta = b.beta[c];
    const double inverse = 1 / sqrt(b.var[c] + b.eps);
    const auto terms = [&](int64_t at, int64_t w, double& dz, double& x_hat) {
      const double x = double(read((const T*)b.x + at));
      dz = double(read((const T*)b.dy + at));
      x_hat = (x - b.mean[c]) * inverse;
      if (b.activation != batchnorm::kNone) {
        const double z = b.y ? double(read((const T*)b.y + at)) : gamma * x_hat + beta;
        if (z <= 0) dz = left_side(dz, b.activation, b.slope);
      }
      if (b.mask && !(((const S*)b.mask)[w] > 0) && !(x - x == 0 && dz - dz == 0)) dz = x_hat = 0;
    };
    double s = 0, q = 0;
    if (!b.sums_given) {
      each_element(b.shape, c, [&](int64_t at, int64_t w) {
        double dz, x_hat;
        terms(at, w, dz, x_hat);
        s += dz;
        q += dz * x_hat;
      });
      b.dbeta[c] = s, b.dgamma[c] = q;
    }
    const bool pulled = b.training && b.count > 0;
    each_element(b.shape, c, [&](int64_t at, int64_t w) {
      double dz, x_hat;
      terms(at, w, dz, x_hat);
      double pull = pulled ? (b.dbeta[c] + x_hat * b.dgamma[c]) / b.count : 0.0;
      if (b.mask) pull *= double(((const S*)b.mask)[w]);
      if (b.dresidual) write((T*)b.dresidual + at, S(dz));
      if (b.dx) write((T*)b.dx + at, S(gamma * inverse * (dz - pull)));
    });
  }
}

}  // namespace
