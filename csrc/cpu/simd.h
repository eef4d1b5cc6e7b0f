// A thin vector wrapper over the compiler's vector extensions: one source for AVX-512, AVX2, SSE2
// and NEON. F is W floats; load and store widen and narrow fp32, bf16 and fp16.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define DPO_W 16
#elif defined(__AVX2__)
#define DPO_W 8
#else
#define DPO_W 4
#endif

namespace dpo {
namespace {

constexpr int W = DPO_W;
typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline F splat(float x) { return x - F{}; }

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class V>
inline V load_raw(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// If either operand is NaN the result is `b`: maxps as the hardware has it, and what the ternary says.
inline F max(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline F min(F a, F b) { return -max(-a, -b); }

inline F load(const float* p) { return load_raw<F>(p); }

inline F load(const bf16* p) {
  U wide = __builtin_convertvector(load_raw<H>(p), U);
  return bits<F>(wide << 16);
}

inline F load(const f16* p) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  U h = __builtin_convertvector(load_raw<H>(p), U);
  U sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  F x = bits<F>(magnitude) * 0x1p112f;              // rebias the exponent, subnormals included
  U special = (magnitude >= (0x7c00u << 13)) & 0x7f800000u;  // inf, NaN
  return bits<F>(bits<U>(x) | special | sign);
#endif
}

inline void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }

inline H to_bf16(F x) {
  U u = bits<U>(x);
  U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  U nan = (U)(x != x);
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), H);
}

inline void store(bf16* p, F x) {
  H h = to_bf16(x);
  std::memcpy(p, &h, sizeof h);
}

inline void store(f16* p, F x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0));
#else
  // Round to nearest even: normals by the exponent's carry, subnormals by a float addition.
  U u = bits<U>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U small = bits<U>(bits<F>(magnitude) + 0.5f) - bits<U>(splat(0.5f));
  U tiny = (U)(magnitude < (113u << 23)), big = (U)(magnitude >= (143u << 23)), nan = (U)(x != x);
  U h = (small & tiny) | (normal & ~tiny);
  h = (0x7c00u & big) | (h & ~big);
  h = (0x7e00u & nan) | (h & ~nan);
  H out = __builtin_convertvector(h | sign, H);
  std::memcpy(p, &out, sizeof out);
#endif
}

// A partial vector at the end of a row: the missing lanes are `fill`.
template <class T>
inline F load_tail(const T* p, int64_t n, float fill) {
  T buffer[W];
  F x;
  std::memset((void*)buffer, 0, sizeof buffer);
  std::memcpy((void*)buffer, p, n * sizeof(T));
  x = load(buffer);
  for (int i = (int)n; i < W; ++i) x[i] = fill;
  return x;
}

template <class T>
inline void store_tail(T* p, F x, int64_t n) {
  T buffer[W];
  store(buffer, x);
  std::memcpy((void*)p, buffer, n * sizeof(T));
}

template <class T>
inline float load_one(const T* p) {
  return load_tail(p, 1, 0.0f)[0];
}

template <class T>
inline void store_one(T* p, float x) {
  store_tail(p, splat(x), 1);
}

// 2^t for t <= 127: relative error 9e-8 and rounding; below -126 it is 2^-126. NaN gives NaN: the power of two is
// applied by a product, since adding it to the exponent's bits can turn a NaN into a number.
inline F exp2(F t) {
  t = max(splat(-126.0f), t);
  const F magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23, and the exponent's bias
  F shifted = t + magic;
  F f = t - (shifted - magic);
  F power = bits<F>(bits<U>(shifted) << 23);
  F p = splat(1.326472731e-3f);
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
  return p * power;
}

// tanh: a polynomial near 0 (no cancellation), 1 - 2 / (exp(2a) + 1) elsewhere. After Cephes.
inline F tanh(F a) {
  F magnitude = a < splat(0.0f) ? -a : a;
  F q = a * a;
  F p = splat(-5.70498872745e-3f);
  p = p * q + 2.06390887954e-2f;
  p = p * q - 5.37397155531e-2f;
  p = p * q + 1.33314422036e-1f;
  p = p * q - 3.33332819422e-1f;
  F near_zero = a + a * q * p;
  F e = exp2(min(magnitude, splat(20.0f)) * 2.88539008f);
  F far = 1.0f - 2.0f / (e + 1.0f);
  far = a < splat(0.0f) ? -far : far;
  F result = magnitude < splat(0.625f) ? near_zero : far;
  return a != a ? a : result;
}

inline float horizontal_max(F x) {
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

inline double horizontal_sum(F x) {
  double s = 0;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
}

}  // namespace
}  // namespace dpo
