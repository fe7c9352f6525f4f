// One vector of elements, in whatever instructions this file is compiled for.
//
// Pack<T> loads a register of T and computes in float (double for double); Single<T> is the same for
// one element, for what a register does not fill. Sums are kept in double: D is what V widens to. (Some
// terms are added in V first: kFold.)
//
// Everything is in an unnamed namespace, and nothing of the standard library is used: this is compiled
// several times with different instructions, and an inline function shared between the copies could
// bring instructions to a processor that lacks them.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "types.h"

namespace {

using batchnorm::BFloat16;
using batchnorm::Float16;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kFloats = kBytes / 4;

typedef float F32 __attribute__((vector_size(kBytes)));
typedef double F64 __attribute__((vector_size(kBytes)));
typedef int32_t I32 __attribute__((vector_size(kBytes)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef int64_t I64 __attribute__((vector_size(kBytes)));
typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));

// The same in memory, at any address.
typedef float F32u __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef double F64u __attribute__((vector_size(kBytes), aligned(8), may_alias));
typedef uint16_t U16u __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));

// A register of floats, widened: two registers of doubles.
struct Pair {
  F64 a, b;
};
inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }

inline Pair widen(F32 v) {
#if defined(__AVX512F__)
  return {(F64)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
          (F64)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#elif defined(__AVX2__)
  return {(F64)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
          (F64)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#elif defined(__x86_64__)
  return {(F64)_mm_cvtps_pd((__m128)v), (F64)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v))};
#elif defined(__aarch64__)
  return {(F64)vcvt_f64_f32(vget_low_f32((float32x4_t)v)), (F64)vcvt_high_f64_f32((float32x4_t)v)};
#else
  return {F64{v[0], v[1]}, F64{v[2], v[3]}};
#endif
}
inline F64 widen(F64 v) { return v; }
inline double widen(float v) { return v; }
inline double widen(double v) { return v; }

// A register of floats from memory, widened: without taking a register apart.
inline Pair load_wide(const float* p) {
#if defined(__AVX512F__)
  return {(F64)_mm512_cvtps_pd(_mm256_loadu_ps(p)), (F64)_mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
#elif defined(__AVX2__)
  return {(F64)_mm256_cvtps_pd(_mm_loadu_ps(p)), (F64)_mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
#else
  return widen((F32)*(const F32u*)p);
#endif
}

inline double total(F64 v) {
  double sum = 0;
  for (int k = 0; k < kBytes / 8; ++k) sum += v[k];
  return sum;
}
inline double total(Pair v) { return total(v.a + v.b); }
inline double total(double v) { return v; }

// a where m, else b. Vectors of the language have the ternary operator; numbers have it anyway.
template <class M, class V>
inline V select(M m, V a, V b) {
  return m ? a : b;
}

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// bfloat16: the upper half of a float. Round to nearest, ties to even; NaN stays NaN.
inline float widen_bf16(uint16_t v) { return from_bits(uint32_t(v) << 16); }
inline uint16_t narrow_bf16(float v) {
  const uint32_t bits = to_bits(v);
  if (v != v) return uint16_t(bits >> 16) | 0x40;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// float16, where the processor has no instruction for it.
inline float widen_f16(uint16_t v) {
#if defined(__F16C__)
  return _cvtsh_ss(v);
#elif defined(__aarch64__)
  __fp16 half;
  memcpy(&half, &v, 2);
  return half;
#else
  const uint32_t sign = uint32_t(v & 0x8000) << 16;
  const uint32_t rest = v & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  // Below float16's smallest normal number: a whole number of 2^-24.
  if (rest < 0x400) return from_bits(sign | to_bits(float(rest) * 0x1p-24f));
  return from_bits(sign | ((rest << 13) + (112u << 23)));
#endif
}
inline uint16_t narrow_f16(float v) {
#if defined(__F16C__)
  return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 half = v;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
#else
  const uint32_t bits = to_bits(v);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // from 65520 on, infinity
  // Below 2^-14: adding 0.5 puts a whole number of 2^-24 in the last bits, rounded.
  if (rest < 0x38800000) return sign | uint16_t(to_bits(from_bits(rest) + 0.5f) - 0x3f000000);
  return sign | uint16_t((rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13);
#endif
}

inline F32 as_float(I32 v) { return (F32)v; }

template <class T>
struct Pack;

template <>
struct Pack<float> {
  typedef float S;
  typedef F32 V;
  typedef Pair D;
  static constexpr int N = kFloats;
  static V load(const float* p) { return *(const F32u*)p; }
  static D widened(const float* p) { return load_wide(p); }
  static void store(float* p, V v) { *(F32u*)p = v; }
  static void stream(float* p, V v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
    _mm_stream_ps(p, (__m128)v);
#else
    store(p, v);
#endif
  }
  static V weights(const float* p) { return load(p); }
  static V splat(float v) { return v - V{}; }
  static D wide(double v) { return {v - F64{}, v - F64{}}; }
  static D sums(const double* p) { return {*(const F64u*)p, *(const F64u*)(p + N / 2)}; }
  static void keep(double* p, D v) { *(F64u*)p = v.a, *(F64u*)(p + N / 2) = v.b; }
  static D from(Pair v) { return v; }
  static Pair pair(D v) { return v; }
};

template <>
struct Pack<double> {
  typedef double S;
  typedef F64 V;
  typedef F64 D;
  static constexpr int N = kFloats / 2;
  static V load(const double* p) { return *(const F64u*)p; }
  static D widened(const double* p) { return load(p); }
  static void store(double* p, V v) { *(F64u*)p = v; }
  static void stream(double* p, V v) {
#if defined(__AVX512F__)
    _mm512_stream_pd(p, (__m512d)v);
#elif defined(__AVX2__)
    _mm256_stream_pd(p, (__m256d)v);
#elif defined(__x86_64__)
    _mm_stream_pd(p, (__m128d)v);
#else
    store(p, v);
#endif
  }
  static V weights(const double* p) { return load(p); }
  static V splat(double v) { return v - V{}; }
  static D wide(double v) { return v - V{}; }
  static D sums(const double* p) { return load(p); }
  static void keep(double* p, D v) { store(p, v); }
  static D from(Pair v) { return v.a; }
  static Pair pair(D v) { return {v, F64{}}; }
};

// How many products of a backward pass are added up in the precision of computation before the sum is
// widened. For 16-bit data a few roundings of float are far below what the elements have, and gradients
// are far from 10³⁷, where eight of them could overflow. To widen each is twice the work, and there work,
// not memory, takes the time. Measured, (8, 64, 56, 56) bfloat16, one thread: backward 0.32 ns an element
// with 1, 0.27 with 4, 0.25 with 8. For float32, where memory is the limit, 2 would gain 5 % at most.
template <class T>
constexpr int kFold = sizeof(T) == 2 ? 8 : 1;

// Half precision: stored in 16 bits, computed in float.
struct PackOf16 : Pack<float> {
  static V weights(const float* p) { return Pack<float>::load(p); }
  static void write(void* p, U16 v, bool past_the_cache) {
#if defined(__AVX512F__)
    if (past_the_cache) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__AVX2__)
    if (past_the_cache) return _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
    (void)past_the_cache;
    *(U16u*)p = v;
  }
};

template <>
struct Pack<BFloat16> : PackOf16 {
  static V load(const BFloat16* p) {
    return (F32)(__builtin_convertvector(*(const U16u*)p, U32) << 16);
  }
  static D widened(const BFloat16* p) { return widen(load(p)); }
  static U16 narrow(V v) {
    const U32 bits = (U32)v;
    const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U32 nan = (bits >> 16) | 0x40;
    return __builtin_convertvector((U32)select(v != v, (I32)nan, (I32)rounded), U16);
  }
  static void store(BFloat16* p, V v) { write(p, narrow(v), false); }
  static void stream(BFloat16* p, V v) { write(p, narrow(v), true); }
};

template <>
struct Pack<Float16> : PackOf16 {
  static V load(const Float16* p) {
#if defined(__AVX512F__)
    return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    V v;
    for (int k = 0; k < N; ++k) v[k] = widen_f16(p[k].bits);
    return v;
#endif
  }
  static D widened(const Float16* p) { return widen(load(p)); }
  static U16 narrow(V v) {
#if defined(__AVX512F__)
    return (U16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
    return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    U16 bits;
    for (int k = 0; k < N; ++k) bits[k] = narrow_f16(v[k]);
    return bits;
#endif
  }
  static void store(Float16* p, V v) { write(p, narrow(v), false); }
  static void stream(Float16* p, V v) { write(p, narrow(v), true); }
};

inline float read(const float* p) { return *p; }
inline double read(const double* p) { return *p; }
inline float read(const BFloat16* p) { return widen_bf16(p->bits); }
inline float read(const Float16* p) { return widen_f16(p->bits); }
inline void write(float* p, float v) { *p = v; }
inline void write(double* p, double v) { *p = v; }
inline void write(BFloat16* p, float v) { p->bits = narrow_bf16(v); }
inline void write(Float16* p, float v) { p->bits = narrow_f16(v); }

// Weights of 1 in the last `count` lanes, else 0: for a register that overlaps the one before, where
// fewer elements are left than it holds.
template <class S, int N>
struct LaneTable {
  S values[2 * N];
  constexpr LaneTable() : values() {
    for (int k = N; k < 2 * N; ++k) values[k] = 1;
  }
};
template <class Q>
inline typename Q::V last_lanes(int64_t count) {
  static constexpr LaneTable<typename Q::S, Q::N> table;
  return Q::weights(table.values + count);
}

// One element at a time.
template <class T>
struct Single {
  typedef typename Pack<T>::S S;
  typedef S V;
  typedef double D;
  static constexpr int N = 1;
  static V load(const T* p) { return read(p); }
  static void store(T* p, V v) { write(p, v); }
  static void stream(T* p, V v) { write(p, v); }
  static V weights(const S* p) { return *p; }
  static V splat(S v) { return v; }
  static D wide(double v) { return v; }
  static D widened(const T* p) { return double(read(p)); }
  static D sums(const double* p) { return *p; }
  static void keep(double* p, D v) { *p = v; }
};

}  // namespace
