// Forward: moments of each channel, then y = activation(γ·(x − mean)/√(var + eps) + β + residual).
//
// The moments are sums, in double, of x − shift and (x − shift)², with a shift near the mean: exact
// differences, of which little cancels (see far_offset). In the second pass the mean is a float
// `near` and what it lacks (in the constant term), so that an offset of 10⁶ σ costs no more than
// the rounding of y.
#pragma once

#include <math.h>

#include "drivers.h"

namespace {

using batchnorm::Forward;

// The shift is one of the channel's elements, so at most σ·√count away from the mean. If its square
// is more σ² than this, the sums are taken again from the mean found: what cancels magnifies the
// sums' own error, which is count / lanes · 2⁻⁵³ at worst. For a result in float, 100 times 10⁷ ·
// 2⁻⁵³ is 10⁻⁷, half a rounding; for one in double nothing may be lost.
constexpr double far_offset(float) { return 100; }
constexpr double far_offset(double) { return 1.0 / 64; }

template <int N>
struct Constant {
  static constexpr int value = N;
};

// y before the activation is (x − near) · scale + constant, for each channel. Both passes of both
// directions take these from here: the backward pass must find the signs that the forward pass had.
template <class S>
struct Affine {
  Array<S> near, scale, constant;
  explicit Affine(int64_t channels) : near(channels), scale(channels), constant(channels) {}

  // `inverse` gives 1/√(var + eps) of a channel.
  template <class F>
  void set(int64_t first, int64_t last, const double* __restrict mean, const F& inverse,
           const double* __restrict gamma, const double* __restrict beta) const {
    S* __restrict to_near = near;
    S* __restrict to_scale = scale;
    S* __restrict to_constant = constant;
    for (int64_t c = first; c < last; ++c) {
      const double slope = gamma[c] * inverse(c);
      const double rounded = double(S(mean[c]));
      to_near[c] = S(rounded);
      to_scale[c] = S(slope);
      to_constant[c] = S(beta[c] - (mean[c] - rounded) * slope);
    }
  }
};

template <class V>
inline V apply(V x, V near, V scale, V constant) {
  return (x - near) * scale + constant;
}

// The activation's left side; NaN comes out as NaN. Not z · slope for relu: −∞ · 0 is NaN.
template <int A, class V>
inline V activate(V z, V slope) {
  if (A == batchnorm::kNone) return z;
  return select(z < V{}, A == batchnorm::kRelu ? V{} : z * slope, z);
}

template <class T>
struct ForwardWork : Work {
  typedef typename Pack<T>::S S;
  typedef Pack<T> P;
  typedef Single<T> P1;
  const Forward& call;
  const T* x;
  const T* residual;
  const S* mask;
  T* y;
  const S slope;
  const double share;  // of one element in a mean
  const int64_t own_columns;
  Array<double> shift, own_shift;
  Affine<S> channel, own;
  // The columns' constants: their own, or the channels'.
  const double* column_shift;
  const Affine<S>& column;

  explicit ForwardWork(const Forward& f)
      : ForwardWork(f, f.mask && f.training, columns_of(f.shape, P::N, f.mask && f.training, f.parts)) {}

  ForwardWork(const Forward& f, bool has_mask, int64_t n)
      : call(f), x((const T*)f.x), residual((const T*)f.residual), mask((const S*)f.mask),
        y((T*)f.y), slope(S(f.slope)), share(f.count > 0 ? 1 / f.count : 0), own_columns(n),
        shift(f.shape.channels), own_shift(n), channel(f.shape.channels), own(n),
        column_shift(n ? own_shift : shift), column(n ? own : channel) {
    shape = f.shape;
    bytes = sizeof(T);
    lanes = P::N;
    two_passes = f.training;
    writes = y != nullptr;
    masked = has_mask;
    if (two_passes) probe();
  }

  // The shifts: of each channel, the first element that counts.
  void probe() const {
    int64_t p = 0;
    const int64_t values = shape.outer * shape.inner;
    while (masked && p < values && !(mask[p] > 0)) ++p;
    const T* at = x + p / shape.inner * shape.channels * shape.inner + p % shape.inner;
    for (int64_t c = 0; c < shape.channels; ++c)
      shift[c] = p == values ? 0.0 : double(read(at + c * shape.inner));
  }

  bool finish(int64_t first, int64_t last, const double* __restrict s,
              const double* __restrict q) override {
    double* __restrict mean = call.mean + first;
    double* __restrict var = call.var + first;
    double* __restrict from = shift + first;
    bool again = false;
    for (int64_t c = 0; c < last - first; ++c) {
      const double offset = s[c] * share, raw = q[c] * share - offset * offset;
      mean[c] = from[c] + offset;
      var[c] = raw < 0 ? 0 : raw;
      const bool far = offset * offset > far_offset(S()) * var[c];
      from[c] = far ? mean[c] : from[c];
      again |= far;
    }
    return again;
  }

  void prepare(int64_t first, int64_t last) override {
    const double* __restrict var = call.var;
    const double eps = call.eps;
    const auto inverse = [=](int64_t c) { return 1 / sqrt(var[c] + eps); };
    channel.set(first, last, call.mean, inverse, call.gamma, call.beta);
  }

  // --- the moments ---

  template <class Q>
  static inline void add(const T* v, typename Q::D k, typename Q::D& s, typename Q::D& q) {
    const typename Q::D d = Q::widened(v) - k;
    s = s + d;
    q = q + d * d;
  }

  template <class Q>
  static inline void add(const T* v, typename Q::V w, typename Q::D k, typename Q::D& s,
                         typename Q::D& q) {
    // Not a product alone: 0 · NaN is NaN, and what is left out may hold NaN.
    const typename Q::D d = widen(select(w > typename Q::V{}, Q::load(v), typename Q::V{})) - k;
    const typename Q::D weighted = widen(w) * d;
    s = s + weighted;
    q = q + weighted * d;
  }

  void first_run(int64_t at, int64_t weight_at, int64_t n, int64_t c, Sums& sums) const override {
    const typename P::D k = P::wide(shift[c]);
    const T* v = x + at;
    // Two of each: a register's sum has to wait for its last.
    typename P::D s = P::from(sums.s), q = P::from(sums.q), s2 = P::wide(0), q2 = P::wide(0);
    int64_t i = 0;
    const S* w = masked ? mask + weight_at : nullptr;
    if (masked) {
      for (; i + P::N <= n; i += P::N) add<P>(v + i, P::weights(w + i), k, s, q);
    } else {
      for (; i + 2 * P::N <= n; i += 2 * P::N) {
        prefetch(v + i);
        prefetch(v + i + P::N);
        add<P>(v + i, k, s, q);
        add<P>(v + i + P::N, k, s2, q2);
      }
      for (; i + P::N <= n; i += P::N) add<P>(v + i, k, s, q);
    }
    if (i < n && n >= P::N) {
      const auto lanes = last_lanes<P>(n - i);
      i = n - P::N;
      add<P>(v + i, masked ? lanes * P::weights(w + i) : lanes, k, s, q);
      i = n;
    }
    for (; i < n; ++i) add<P1>(v + i, masked ? w[i] : S(1), shift[c], sums.rest_s, sums.rest_q);
    sums.s = P::pair(s + s2);
    sums.q = P::pair(q + q2);
  }

  // Of `lanes` columns alone, if not all.
  template <class Q, bool All = true>
  inline void column_sums(int64_t from, int64_t to, int64_t j, double* s, double* q,
                          typename Q::V lanes = typename Q::V()) const {
    const typename Q::D k = Q::sums(column_shift + j);
    typename Q::D sum_s = Q::sums(s + j), sum_q = Q::sums(q + j);
    const T* v = x + j;
    const int64_t step = columns, next = (to - from) * step * int64_t(sizeof(T));
    if (masked || !All)
      for (int64_t row = from; row < to; ++row) {
        const typename Q::V w = Q::splat(masked ? mask[row] : S(1));
        add<Q>(v + row * step, All ? w : w * lanes, k, sum_s, sum_q);
      }
    else
      for (int64_t row = from; row < to; ++row) {
        prefetch(v + row * step, next);
        add<Q>(v + row * step, k, sum_s, sum_q);
      }
    Q::keep(s + j, sum_s);
    Q::keep(q + j, sum_q);
  }

  void first_rows(int64_t from, int64_t to, int64_t begin, int64_t end, double* s,
                  double* q) const override {
    int64_t j = begin;
    for (; j + P::N <= end; j += P::N) column_sums<P>(from, to, j, s, q);
    if (j < end && begin + P::N <= end) {
      column_sums<P, false>(from, to, end - P::N, s, q, last_lanes<P>(end - j));
      j = end;
    }
    for (; j < end; ++j) column_sums<P1>(from, to, j, s, q);
  }

  // --- the output ---

  // A channel's constants in registers. Held apart from the members, which the compiler would read
  // again after each store: a store may change anything, for all it knows.
  template <class Q, int A, bool HasResidual>
  struct Put {
    typedef typename Q::V V;
    const T* x;
    const T* residual;
    T* y;
    V near, scale, constant, slope;

    inline V value(int64_t at) const {
      V z = apply(Q::load(x + at), near, scale, constant);
      if (HasResidual) z = z + Q::load(residual + at);
      return activate<A>(z, slope);
    }
    inline void store(int64_t at) const { Q::store(y + at, value(at)); }
    inline void stream(int64_t at) const {
      prefetch(x + at);
      if (HasResidual) prefetch(residual + at);
      Q::stream(y + at, value(at));
    }
  };

  template <int A, bool HasResidual>
  void put_run(int64_t at, int64_t n, int64_t c) const {
    const S near = channel.near[c], scale = channel.scale[c], constant = channel.constant[c];
    const Put<P, A, HasResidual> put = {x, residual, y, P::splat(near), P::splat(scale),
                                        P::splat(constant), P::splat(slope)};
    const Put<P1, A, HasResidual> put1 = {x, residual, y, near, scale, constant, slope};
    const int64_t end = at + n;
    if (call.stream) {
      for (; at < end && (uintptr_t)(y + at) % (P::N * sizeof(T)) != 0; ++at) put1.store(at);
      for (; at + P::N <= end; at += P::N) put.stream(at);
    } else {
      for (; at + P::N <= end; at += P::N) put.store(at);
      // Some elements twice, to the same values.
      if (at < end && n >= P::N) put.store(end - P::N), at = end;
    }
    for (; at < end; ++at) put1.store(at);
  }

  // Of `Wide` registers side by side.
  template <class Q, int A, bool HasResidual, int Wide = 1>
  inline void put_columns(int64_t from, int64_t to, int64_t j, bool stream) const {
    typedef Put<Q, A, HasResidual> Columns;
    const auto columns_at = [&](int64_t at) {
      return Columns{x + at,
                     moved(residual, at),
                     y + at,
                     Q::weights(column.near + at),
                     Q::weights(column.scale + at),
                     Q::weights(column.constant + at),
                     Q::splat(slope)};
    };
    const Columns put = columns_at(j), beside = columns_at(j + (Wide - 1) * Q::N);
    const int64_t step = columns, next = (from - to) * step * int64_t(sizeof(T));
    for (int64_t row = to; row-- > from;) {
      const int64_t at = row * step;
      prefetch(put.x + at, next);
      if (HasResidual) prefetch(put.residual + at, next);
      if (stream) {
        Q::stream(put.y + at, put.value(at));
        if (Wide > 1) Q::stream(beside.y + at, beside.value(at));
      } else {
        put.store(at);
        if (Wide > 1) beside.store(at);
      }
    }
  }

  template <int A, bool HasResidual>
  void put_rows(int64_t from, int64_t to, int64_t begin, int64_t end) const {
    const int64_t size = P::N * sizeof(T);
    const bool stream = call.stream && (uintptr_t)(y + begin) % size == 0 && columns % P::N == 0;
    int64_t j = begin;
    // A register of 16-bit elements is half a cache line.
    if (sizeof(T) == 2)
      for (; j + 2 * P::N <= end; j += 2 * P::N)
        put_columns<P, A, HasResidual, 2>(from, to, j, stream);
    for (; j + P::N <= end; j += P::N) put_columns<P, A, HasResidual>(from, to, j, stream);
    if (j < end && begin + P::N <= end) {
      put_columns<P, A, HasResidual>(from, to, end - P::N, false);
      j = end;
    }
    for (; j < end; ++j) put_columns<P1, A, HasResidual>(from, to, j, false);
  }

  // Calls body with the activation and whether there is a residual, as constants.
  template <class F>
  inline void by_fusion(const F& body) const {
    using namespace batchnorm;
    const auto with = [&](auto has_residual) {
      switch (call.activation) {
        case kNone: return body(Constant<kNone>(), has_residual);
        case kRelu: return body(Constant<kRelu>(), has_residual);
        case kLeakyRelu: return body(Constant<kLeakyRelu>(), has_residual);
      }
    };
    if (residual) with(Constant<1>());
    else with(Constant<0>());
  }

  void second_run(int64_t at, int64_t, int64_t n, int64_t c) const override {
    by_fusion([&](auto a, auto r) { put_run<a.value, r.value>(at, n, c); });
  }

  void second_rows(int64_t from, int64_t to, int64_t begin, int64_t end) const override {
    by_fusion([&](auto a, auto r) { put_rows<a.value, r.value>(from, to, begin, end); });
  }

  void spread_first() override { spread<double>(shape, shift, own_shift, own_columns); }

  void spread_second() override {
    spread<S>(shape, channel.near, own.near, own_columns);
    spread<S>(shape, channel.scale, own.scale, own_columns);
    spread<S>(shape, channel.constant, own.constant, own_columns);
  }
};

}  // namespace
