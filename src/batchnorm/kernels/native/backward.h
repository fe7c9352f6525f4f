// Backward: dβ = Σ dz and dγ = Σ dz·x̂ with dz = dy · activation′(z), then
// dx = γ/√(var + eps) · (dz − w/count · (dβ + x̂·dγ)); without the bracket's second term where the
// moments were given.
//
// z is not stored: its sign is computed again from x by forward.h's own formula, or, where a residual
// was added, told from y.
#pragma once

#include "forward.h"

namespace {

using batchnorm::Backward;

// Where the activation's side is told from. kKeep, in the first pass: from y, and dz is written at
// once, for the residual's gradient; kKept, in the second: dz is read there. So y and dy are read once.
enum Side : int { kNoSide, kFromX, kFromY, kKeep, kKept };

// What each channel's elements meet: x̂ is (x − near) · inverse + centre, dx is scale · dz +
// w · (slant · x̂ + level), and z, before any residual, is (x − near) · scale + constant.
// The last two are known only once the sums are.
enum Constants : int { kNear, kInverse, kCentre, kScale, kConstant, kSlant, kLevel, kConstants };

template <class T>
struct BackwardWork : Work {
  typedef typename Pack<T>::S S;
  typedef Pack<T> P;
  typedef Single<T> P1;
  const Backward& call;
  const T* dy;
  const T* x;
  const T* y;
  const S* mask;
  T* dx;
  T* dresidual;
  const S slope;
  const bool relu;
  static constexpr int64_t kRegister = P::N * sizeof(T);
  const bool keeps;           // dz, as above
  const bool streams;         // outputs are written past the cache: dx, and dresidual beside it
  bool in_registers = false;  // and each row begins at a register's boundary: rows need that for it
  const int64_t own_columns;
  Affine<S> side;
  Array<double> inverse;
  Array<S> channel, own;  // each of the Constants of all channels, of all columns that need it
  const S* column;
  const int64_t of_kind;  // how many of each constant `column` has

  explicit BackwardWork(const Backward& b)
      : call(b), dy((const T*)b.dy), x((const T*)b.x), y((const T*)b.y), mask((const S*)b.mask),
        dx((T*)b.dx), dresidual((T*)b.dresidual), slope(S(b.slope)),
        relu(b.activation == batchnorm::kRelu), keeps(keeps_dz(b)),
        streams(b.stream && dx &&
                (!dresidual || ((uintptr_t)dx - (uintptr_t)dresidual) % kRegister == 0)),
        own_columns(columns_of(b.shape, P::N, b.mask, b.parts)),
        side(b.shape.channels), inverse(b.shape.channels), channel(kConstants * b.shape.channels),
        own(kConstants * own_columns), column(own_columns ? own : channel),
        of_kind(own_columns ? own_columns : b.shape.channels) {
    shape = b.shape;
    bytes = sizeof(T);
    lanes = P::N;
    two_passes = !b.sums_given;
    writes = dx || dresidual;
    masked = b.mask != nullptr;
    const int64_t n = shape.channels;
    double* __restrict to_exact = inverse;
    for (int64_t c = 0; c < n; ++c) to_exact[c] = 1 / sqrt(b.var[c] + b.eps);
    side.set(0, n, b.mean, [=](int64_t c) { return to_exact[c]; }, b.gamma, b.beta);
    memcpy(channel + kNear * n, side.near, n * sizeof(S));
    memcpy(channel + kScale * n, side.scale, n * sizeof(S));
    memcpy(channel + kConstant * n, side.constant, n * sizeof(S));
    S* __restrict to_inverse = channel + kInverse * n;
    S* __restrict to_centre = channel + kCentre * n;
    for (int64_t c = 0; c < n; ++c) {
      const double mean = b.mean[c], exact = to_exact[c];
      to_inverse[c] = S(exact);
      to_centre[c] = S((double(S(mean)) - mean) * exact);
    }
  }

  bool finish(int64_t first, int64_t last, const double* s, const double* q) override {
    memcpy(call.dbeta + first, s, (last - first) * sizeof(double));
    memcpy(call.dgamma + first, q, (last - first) * sizeof(double));
    return false;
  }

  void prepare(int64_t first, int64_t last) override {
    const int64_t n = shape.channels;
    const double share = call.count > 0 ? 1 / call.count : 0;
    for (int64_t c = first; c < last; ++c) {
      const double scale = -share * call.gamma[c] * inverse[c];
      channel[kSlant * n + c] = S(scale * call.dgamma[c]);
      channel[kLevel * n + c] = S(scale * call.dbeta[c]);
    }
  }

  // Not for 16-bit data with leaky_relu: the dz written is rounded. Not where planes are written past the
  // cache: dz would go through the cache that the second pass relies on.
  static bool keeps_dz(const Backward& b) {
    return b.dresidual && b.dx && b.y && !b.sums_given &&
           (b.activation == batchnorm::kRelu || sizeof(T) > 2) &&
           (!b.stream || in_rows(b.shape, b.mask, b.parts));
  }

  // A channel's constants in registers; see forward.h's Put.
  template <class Q, int Where, bool Masked>
  struct Local {
    typedef typename Q::V V;
    const T* dy;
    const T* x;
    const T* y;
    T* dx;
    T* dresidual;
    V slope, near, inverse, centre, scale, slant, level, constant;
    bool relu, training, past_cache;

    // dz and x̂ of a few elements. Both are 0 where an element does not count and one of them is not
    // finite: its share would poison what does.
    struct Terms {
      V dz, x_hat;
    };
    inline Terms terms(int64_t at, V w) const {
      V dz = Q::load(dy + at);
      const V v = Q::load(x + at);
      if (Where != kNoSide && Where != kKept) {
        const V z = Where != kFromX ? Q::load(y + at) : apply(v, near, scale, constant);
        // Not a product for relu: an infinite gradient · 0 is NaN.
        dz = select(z <= V{}, relu ? V{} : dz * slope, dz);
      }
      const V x_hat = (v - near) * inverse + centre;
      if (!Masked) return {dz, x_hat};
      const auto sound = (w > V{}) | ((x_hat - x_hat == V{}) & (dz - dz == V{}));
      return {select(sound, dz, V{}), select(sound, x_hat, V{})};
    }

    // The first pass's: dz is written, where it is kept.
    inline Terms kept_terms(int64_t at, V w) const {
      const Terms t = terms(at, w);
      if (Where != kKeep) return t;
      if (past_cache) Q::stream(dresidual + at, t.dz);
      else Q::store(dresidual + at, t.dz);
      return t;
    }

    static inline void add(const Terms& t, typename Q::D& s, typename Q::D& q) {
      const typename Q::D dz = widen(t.dz);
      s = s + dz;
      q = q + dz * widen(t.x_hat);
    }
    inline void sum(int64_t at, V w, typename Q::D& s, typename Q::D& q) const {
      add(kept_terms(at, w), s, q);
    }
    // Of kFold registers, `step` elements apart, whose weights are what `weight` gives for 0, 1, …
    template <class F>
    inline void sum_several(int64_t at, int64_t step, const F& weight, typename Q::D& s,
                            typename Q::D& q) const {
      V sum_s = {}, sum_q = {};
      for (int i = 0; i < kFold<T>; ++i) {
        const Terms t = kept_terms(at + i * step, weight(i));
        sum_s = sum_s + t.dz;
        sum_q = sum_q + t.dz * t.x_hat;
      }
      s = s + widen(sum_s);
      q = q + widen(sum_q);
    }
    // Of `lanes` alone.
    inline void sum(int64_t at, V w, V lanes, typename Q::D& s, typename Q::D& q) const {
      const Terms t = kept_terms(at, w);
      add({select(lanes > V{}, t.dz, V{}), select(lanes > V{}, t.x_hat, V{})}, s, q);
    }

    template <bool Stream>
    inline void put(int64_t at, V w) const {
      const Terms t = terms(at, w);
      // Without an activation it is dy itself, unless a mask drops some of it.
      if (Where != kKept && (Where == kFromY || Masked) && dresidual) {
        if (Stream) Q::stream(dresidual + at, t.dz);
        else Q::store(dresidual + at, t.dz);
      }
      if ((Where == kFromY || Masked) && !dx) return;
      V d = scale * t.dz;
      // Constants of 0 would not do: 0 · NaN is NaN.
      if (training) {
        const V pull = slant * t.x_hat + level;
        d = d + (Masked ? w * pull : pull);
      }
      if (Stream) Q::stream(dx + at, d);
      else Q::store(dx + at, d);
    }

    inline void ahead(int64_t at, int64_t by = kAhead) const {
      prefetch(x + at, by);
      prefetch(dy + at, by);
      if (Where == kFromY || Where == kKeep) prefetch(y + at, by);
    }
  };

  template <class Q, int Where, bool Masked>
  inline Local<Q, Where, Masked> of_channel(int64_t c) const {
    const int64_t n = shape.channels;
    const S* k = channel + c;
    return {Where == kKept ? dresidual : dy, x, y, dx, dresidual, Q::splat(slope),
            Q::splat(k[kNear * n]), Q::splat(k[kInverse * n]), Q::splat(k[kCentre * n]), Q::splat(k[kScale * n]),
            Q::splat(k[kSlant * n]), Q::splat(k[kLevel * n]), Q::splat(k[kConstant * n]), relu,
            call.training, false};
  }

  template <class Q, int Where, bool Masked>
  inline Local<Q, Where, Masked> of_column(int64_t j, bool past_cache) const {
    const S* k = column + j;
    return {(Where == kKept ? dresidual : dy) + j, x + j, moved(y, j), moved(dx, j),
            moved(dresidual, j), Q::splat(slope), Q::weights(k + kNear * of_kind), Q::weights(k + kInverse * of_kind),
            Q::weights(k + kCentre * of_kind), Q::weights(k + kScale * of_kind),
            Q::weights(k + kSlant * of_kind), Q::weights(k + kLevel * of_kind),
            Q::weights(k + kConstant * of_kind), relu, call.training, past_cache};
  }

  // --- runs of one channel ---

  template <int Where, bool Masked>
  void sum_run(int64_t at, int64_t weight_at, int64_t n, int64_t c, Sums& sums) const {
    const auto local = of_channel<P, Where, Masked>(c);
    const auto local1 = of_channel<P1, Where, Masked>(c);
    const S* w = moved(mask, weight_at - at);
    const auto weight = [&](int64_t i) { return Masked ? P::weights(w + i) : typename P::V{}; };
    const int64_t end = at + n;
    typename P::D s = P::from(sums.s), q = P::from(sums.q), s2 = P::wide(0), q2 = P::wide(0);
    if (kFold<T> > 1)
      for (; at + kFold<T> * P::N <= end; at += kFold<T> * P::N) {
        for (int i = 0; i < kFold<T> * P::N; i += 64 / sizeof(T)) local.ahead(at + i);
        local.sum_several(at, P::N, [&](int i) { return weight(at + i * P::N); }, s, q);
      }
    for (; at + 2 * P::N <= end; at += 2 * P::N) {
      local.ahead(at);
      local.ahead(at + P::N);
      local.sum(at, weight(at), s, q);
      local.sum(at + P::N, weight(at + P::N), s2, q2);
    }
    for (; at + P::N <= end; at += P::N) local.sum(at, weight(at), s, q);
    if (at < end && n >= P::N) {
      local.sum(end - P::N, weight(end - P::N), last_lanes<P>(end - at), s, q);
      at = end;
    }
    sums.s = P::pair(s + s2);
    sums.q = P::pair(q + q2);
    for (; at < end; ++at) local1.sum(at, Masked ? w[at] : S(0), sums.rest_s, sums.rest_q);
  }

  template <int Where, bool Masked>
  void put_run(int64_t at, int64_t weight_at, int64_t n, int64_t c) const {
    const auto local = of_channel<P, Where, Masked>(c);
    const auto local1 = of_channel<P1, Where, Masked>(c);
    const S* w = moved(mask, weight_at - at);
    const auto weight = [&](int64_t i) { return Masked ? P::weights(w + i) : typename P::V{}; };
    const auto single = [&](int64_t i) { local1.template put<false>(i, Masked ? w[i] : S(0)); };
    const int64_t end = at + n;
    if (streams) {
      for (; at < end && (uintptr_t)(dx + at) % kRegister != 0; ++at) single(at);
      for (; at + P::N <= end; at += P::N) local.template put<true>(at, weight(at));
    } else {
      for (; at + P::N <= end; at += P::N) local.template put<false>(at, weight(at));
      // Some elements twice, to the same values.
      if (at < end && n >= P::N) local.template put<false>(end - P::N, weight(end - P::N)), at = end;
    }
    for (; at < end; ++at) single(at);
  }

  // --- rows ---

  // Of `lanes` columns alone, if not all.
  template <class Q, int Where, bool Masked, bool All = true>
  inline void column_sums(int64_t from, int64_t to, int64_t j, double* s, double* q,
                          typename Q::V lanes = typename Q::V()) const {
    const bool past_cache = All && Q::N > 1 && in_registers && call.stream_early;
    const auto local = of_column<Q, Where, Masked>(j, past_cache);
    typename Q::D sum_s = Q::sums(s + j), sum_q = Q::sums(q + j);
    const int64_t step = columns, next = (to - from) * step * int64_t(sizeof(T));
    const auto weight = [&](int64_t row) { return Q::splat(Masked ? mask[row] : S(0)); };
    int64_t row = from;
    if constexpr (kFold<T> > 1 && All && Q::N > 1)
      for (; row + kFold<T> <= to; row += kFold<T>) {
        for (int i = 0; i < kFold<T>; ++i) local.ahead((row + i) * step, next);
        local.sum_several(row * step, step, [&](int i) { return weight(row + i); }, sum_s, sum_q);
      }
    for (; row < to; ++row) {
      local.ahead(row * step, next);
      if (All) local.sum(row * step, weight(row), sum_s, sum_q);
      else local.sum(row * step, weight(row), lanes, sum_s, sum_q);
    }
    Q::keep(s + j, sum_s);
    Q::keep(q + j, sum_q);
  }

  template <class Q, int Where, bool Masked, bool Stream>
  inline void put_columns(int64_t from, int64_t to, int64_t j) const {
    const auto local = of_column<Q, Where, Masked>(j, false);
    const S* w = mask;
    const int64_t step = columns, next = (from - to) * step * int64_t(sizeof(T));
    for (int64_t row = to; row-- > from;) {
      local.ahead(row * step, next);
      local.template put<Stream>(row * step, Q::splat(Masked ? w[row] : S(0)));
    }
  }

  template <int Where, bool Masked>
  void put_rows(int64_t from, int64_t to, int64_t begin, int64_t end) const {
    int64_t j = begin;
    if (in_registers)
      for (; j + P::N <= end; j += P::N) put_columns<P, Where, Masked, true>(from, to, j);
    else
      for (; j + P::N <= end; j += P::N) put_columns<P, Where, Masked, false>(from, to, j);
    if (j < end && begin + P::N <= end) {
      put_columns<P, Where, Masked, false>(from, to, end - P::N);
      j = end;
    }
    for (; j < end; ++j) put_columns<P1, Where, Masked, false>(from, to, j);
  }

  // Calls body with where the side is told from and whether there is a mask, as constants.
  template <Side Keeping, class F>
  inline void by_variant(const F& body) const {
    const auto with = [&](auto is_masked) {
      if (call.activation == batchnorm::kNone) body(Constant<kNoSide>(), is_masked);
      else if (keeps) body(Constant<Keeping>(), is_masked);
      else if (y) body(Constant<kFromY>(), is_masked);
      else body(Constant<kFromX>(), is_masked);
    };
    if (masked) with(Constant<1>());
    else with(Constant<0>());
  }

  void first_run(int64_t at, int64_t weight_at, int64_t n, int64_t c, Sums& sums) const override {
    by_variant<kKeep>([&](auto w, auto m) { sum_run<w.value, m.value>(at, weight_at, n, c, sums); });
  }

  void second_run(int64_t at, int64_t weight_at, int64_t n, int64_t c) const override {
    by_variant<kKept>([&](auto w, auto m) { put_run<w.value, m.value>(at, weight_at, n, c); });
  }

  void first_rows(int64_t from, int64_t to, int64_t begin, int64_t end, double* s,
                  double* q) const override {
    by_variant<kKeep>([&](auto w, auto m) {
      int64_t j = begin;
      for (; j + P::N <= end; j += P::N) column_sums<P, w.value, m.value>(from, to, j, s, q);
      if (j < end && begin + P::N <= end) {
        column_sums<P, w.value, m.value, false>(from, to, end - P::N, s, q, last_lanes<P>(end - j));
        j = end;
      }
      for (; j < end; ++j) column_sums<P1, w.value, m.value>(from, to, j, s, q);
    });
  }

  void second_rows(int64_t from, int64_t to, int64_t begin, int64_t end) const override {
    by_variant<kKept>([&](auto w, auto m) { put_rows<w.value, m.value>(from, to, begin, end); });
  }

  void spread_kinds(int first, int last) {
    in_registers = streams && (uintptr_t)dx % kRegister == 0 && columns % P::N == 0;
    for (int m = first; m < last; ++m)
      spread<S>(shape, channel + m * shape.channels, own + m * own_columns, own_columns);
  }
  void spread_first() override { spread_kinds(0, kConstants); }
  void spread_second() override { spread_kinds(two_passes ? kSlant : 0, kConstants); }
};

}  // namespace
