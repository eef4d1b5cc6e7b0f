// What the CUDA kernels are written in: 16-byte vectors, asynchronous copies, reductions, launches.
//
// Inline PTX stands here alone, each behind a small function with a plain C++ twin. Without nvcc
// (`__CUDACC__`) a header that plays the CUDA runtime on the host comes first
// (tests/cuda_on_host), so that the source nvcc compiles also runs, slowly, under the sanitizers.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../params.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define DPO_DEVICE __device__ __forceinline__
#define DPO_DEVICE_COLD __device__ __noinline__
#else
#define DPO_DEVICE inline
#define DPO_DEVICE_COLD inline
#endif

namespace dpo {
namespace cuda {

constexpr unsigned FULL = 0xffffffffu;
constexpr int WARP = 32;
constexpr float INF = INFINITY;

// ---- elements -----------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct alignas(16) Vec {  // 16 bytes: 4 floats or 8 halves
  uint32_t w[4];
};

DPO_DEVICE float as_float(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

DPO_DEVICE uint32_t as_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

#ifndef __CUDACC__
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31u, f = h & 1023u;
  if (e == 31) return as_float(sign | 0x7f800000u | (f << 13));
  if (e) return as_float(sign | ((e + 112) << 23) | (f << 13));
  return std::copysign(std::ldexp((float)f, -24), as_float(sign));
}
inline uint16_t float_to_half(float x) {  // to nearest even
  const uint16_t sign = (as_bits(x) >> 16) & 0x8000u;
  const float a = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7fffu;
  if (a >= 65520.0f) return sign | 0x7c00u;
  if (a < 6.103515625e-5f) return sign | (uint16_t)std::nearbyint(std::ldexp(a, 24));
  uint32_t u = as_bits(a);
  u += 0xfffu + ((u >> 13) & 1u);
  return sign | (uint16_t)((u >> 13) - (112u << 10));
}
inline uint16_t float_to_bf16(float x) {  // to nearest even
  const uint32_t u = as_bits(x);
  if (std::isnan(x)) return 0x7fffu;
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
#endif

#ifndef __CUDACC__
inline float bf16_to_float(uint16_t h) { return as_float((uint32_t)h << 16); }
#endif

// The larger, or the smaller, of each half of two words; of a NaN and a number the number.
DPO_DEVICE uint32_t bf16_max(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t r;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  const float low = std::fmax(bf16_to_float((uint16_t)a), bf16_to_float((uint16_t)b));
  const float high = std::fmax(bf16_to_float((uint16_t)(a >> 16)), bf16_to_float((uint16_t)(b >> 16)));
  return float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16;
#endif
}

DPO_DEVICE uint32_t bf16_min(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t r;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  const float low = std::fmin(bf16_to_float((uint16_t)a), bf16_to_float((uint16_t)b));
  const float high = std::fmin(bf16_to_float((uint16_t)(a >> 16)), bf16_to_float((uint16_t)(b >> 16)));
  return float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16;
#endif
}

DPO_DEVICE uint32_t f16_max(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t r;
  asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  const float low = std::fmax(half_to_float((uint16_t)a), half_to_float((uint16_t)b));
  const float high = std::fmax(half_to_float((uint16_t)(a >> 16)), half_to_float((uint16_t)(b >> 16)));
  return float_to_half(low) | (uint32_t)float_to_half(high) << 16;
#endif
}

DPO_DEVICE uint32_t f16_min(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t r;
  asm("min.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  const float low = std::fmin(half_to_float((uint16_t)a), half_to_float((uint16_t)b));
  const float high = std::fmin(half_to_float((uint16_t)(a >> 16)), half_to_float((uint16_t)(b >> 16)));
  return float_to_half(low) | (uint32_t)float_to_half(high) << 16;
#endif
}

// How a dtype lies in a 16-byte vector. A word of LOWEST is -inf. `unpack` flips signs where `sign` is the sign bit, not 0;
// `larger` and `smaller` work on a word of a vector, `fold_max` and `fold_min` are of its elements.
template <class T>
struct Elements;

template <>
struct Elements<float> {
  static constexpr int N = 4;
  static constexpr uint32_t LOWEST = 0xff800000u;
  static DPO_DEVICE void unpack(const Vec& v, float* x, uint32_t sign) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = as_float(v.w[i] ^ sign);
  }
  static DPO_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    return as_bits(fmaxf(as_float(a), as_float(b)));
  }
  static DPO_DEVICE uint32_t smaller(uint32_t a, uint32_t b) {
    return as_bits(fminf(as_float(a), as_float(b)));
  }
  static DPO_DEVICE float fold_max(uint32_t a) { return as_float(a); }
  static DPO_DEVICE float fold_min(uint32_t a) { return as_float(a); }
  static DPO_DEVICE Vec pack(const float* x) {
    Vec v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = as_bits(x[i]);
    return v;
  }
  static DPO_DEVICE float widen(float x) { return x; }
  static DPO_DEVICE float narrow(float x) { return x; }
};

template <>
struct Elements<bf16> {
  static constexpr int N = 8;
  static constexpr uint32_t LOWEST = 0xff80ff80u;
  static DPO_DEVICE void unpack(const Vec& v, float* x, uint32_t sign) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = as_float(v.w[i] * 65536u + sign);  // an instruction; the sum flips the highest bit
      x[2 * i + 1] = as_float((v.w[i] & 0xffff0000u) ^ sign);
    }
  }
  static DPO_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return bf16_max(a, b); }
  static DPO_DEVICE uint32_t smaller(uint32_t a, uint32_t b) { return bf16_min(a, b); }
  static DPO_DEVICE float fold_max(uint32_t a) {
    return fmaxf(as_float(a << 16), as_float(a & 0xffff0000u));
  }
  static DPO_DEVICE float fold_min(uint32_t a) {
    return fminf(as_float(a << 16), as_float(a & 0xffff0000u));
  }
  static DPO_DEVICE uint32_t pair(float lo, float hi) {
#ifdef __CUDACC__
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
#else
    return float_to_bf16(lo) | ((uint32_t)float_to_bf16(hi) << 16);
#endif
  }
  static DPO_DEVICE Vec pack(const float* x) {
    Vec v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = pair(x[2 * i], x[2 * i + 1]);
    return v;
  }
  static DPO_DEVICE float widen(bf16 x) { return as_float((uint32_t)x.bits << 16); }
  static DPO_DEVICE bf16 narrow(float x) { return {(uint16_t)pair(x, 0.0f)}; }
};

template <>
struct Elements<f16> {
  static constexpr int N = 8;
  static constexpr uint32_t LOWEST = 0xfc00fc00u;
  static DPO_DEVICE float one(uint32_t bits) {
#ifdef __CUDACC__
    float x;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(bits));
    return x;
#else
    return half_to_float((uint16_t)bits);
#endif
  }
  static DPO_DEVICE uint32_t pair(float lo, float hi) {
#ifdef __CUDACC__
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
#else
    return float_to_half(lo) | ((uint32_t)float_to_half(hi) << 16);
#endif
  }
  static DPO_DEVICE void unpack(const Vec& v, float* x, uint32_t sign) {
    const uint32_t signs = sign | sign >> 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t w = v.w[i] ^ signs;
      x[2 * i] = one(w & 0xffffu);
      x[2 * i + 1] = one(w >> 16);
    }
  }
  static DPO_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return f16_max(a, b); }
  static DPO_DEVICE uint32_t smaller(uint32_t a, uint32_t b) { return f16_min(a, b); }
  static DPO_DEVICE float fold_max(uint32_t a) { return fmaxf(one(a & 0xffffu), one(a >> 16)); }
  static DPO_DEVICE float fold_min(uint32_t a) { return fminf(one(a & 0xffffu), one(a >> 16)); }
  static DPO_DEVICE Vec pack(const float* x) {
    Vec v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = pair(x[2 * i], x[2 * i + 1]);
    return v;
  }
  static DPO_DEVICE float widen(f16 x) { return one(x.bits); }
  static DPO_DEVICE f16 narrow(float x) { return {(uint16_t)pair(x, 0.0f)}; }
};

// Two elements of 16 bits at a time. Of NaN and numbers the numbers': exp2 keeps the NaN.
template <class T, int VECTORS>
DPO_DEVICE float largest(const Vec (&v)[VECTORS]) {
  uint32_t w = v[0].w[0];
#pragma unroll
  for (int i = 1; i < VECTORS * 4; ++i) w = Elements<T>::larger(w, v[i / 4].w[i % 4]);
  return Elements<T>::fold_max(w);
}

template <class T, int VECTORS>
DPO_DEVICE float smallest(const Vec (&v)[VECTORS]) {
  uint32_t w = v[0].w[0];
#pragma unroll
  for (int i = 1; i < VECTORS * 4; ++i) w = Elements<T>::smaller(w, v[i / 4].w[i % 4]);
  return Elements<T>::fold_min(w);
}

constexpr int LINE = 8;  // vectors: 128 bytes, what memory is moved in

// A row of V elements that may start anywhere: `head` elements up to the first 16-byte boundary,
// `vectors` whole vectors, and the rest.
struct Span {
  int head, vectors, tail;
};

template <class T>
DPO_DEVICE Span span_of(const T* row, int V) {
  constexpr int N = Elements<T>::N;
  const int head = (int)((16 - ((uintptr_t)row & 15)) & 15) / (int)sizeof(T);
  if (head >= V) return {V, 0, 0};
  return {head, (V - head) / N, (V - head) % N};
}

// The start of row `index` of [R, T, V] with strides (stride_r, stride_t, 1). Rows and columns are
// counted in 32 bits (the host checks), elements in 64.
template <class T>
DPO_DEVICE T* row_at(T* base, int64_t stride_r, int64_t stride_t, int64_t columns, int index) {
  const unsigned T_ = (unsigned)columns;
  return base + (index / T_) * stride_r + (index % T_) * stride_t;
}

// What stands in the way of that; null if nothing does.
inline const char* too_large(int64_t rows, int64_t V) {
  if (V > INT32_MAX / 2) return "the vocabulary has more than 2^30 entries";
  if (rows > INT32_MAX / 2) return "there are more than 2^30 rows";
  return nullptr;
}

// ---- memory -------------------------------------------------------------------------------------

// Read once: not kept in L1. Not the read-only path: in place the same kernel writes there.
DPO_DEVICE Vec load_once(const Vec* p) {
#ifdef __CUDACC__
  Vec v;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
#else
  return *p;
#endif
}

// 16 bytes from global to shared memory, in flight until `async_wait`: only the issuing thread may
// then read them without a barrier.
DPO_DEVICE void async_copy(Vec* shared, const Vec* global) {
#ifdef __CUDACC__
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global)
               : "memory");
#else
  host::async_copy(shared, global, sizeof(Vec));
#endif
}

DPO_DEVICE void async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::async_commit();
#endif
}

// Until at most PENDING of the committed groups are in flight.
template <int PENDING>
DPO_DEVICE void async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  host::async_wait(PENDING);
#endif
}

// Adds, ordering what this thread (and, after a barrier, its block) wrote before it, and what is
// read after it.
DPO_DEVICE uint32_t add_acq_rel(uint32_t* p, uint32_t n) {
#ifdef __CUDACC__
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(n) : "memory");
  return old;
#else
  return host::add<__ATOMIC_ACQ_REL>(p, n);
#endif
}

DPO_DEVICE uint32_t add_relaxed(uint32_t* p, uint32_t n) {
#ifdef __CUDACC__
  return atomicAdd(p, n);
#else
  return host::add<__ATOMIC_RELAXED>(p, n);
#endif
}

// What another block wrote in this launch: past this multiprocessor's own cache.
template <class T>
DPO_DEVICE T load_cross_block(const T* p) {
#ifdef __CUDACC__
  return __ldcg(p);
#else
  return *p;
#endif
}

// The block's dynamic shared memory.
DPO_DEVICE unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
#else
  return host::shared_memory();
#endif
}

// __syncthreads that warps with different work may meet from different places in the code.
DPO_DEVICE void block_barrier() {
#ifdef __CUDACC__
  asm volatile("bar.sync 0;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Where `count` threads of a block say, round after round, that something is done, in shared memory.
// What they wrote before is seen by whom has waited for the round. Nobody may be two rounds ahead.
struct Arrivals {
  uint64_t state;
};

DPO_DEVICE void begin_arrivals(Arrivals* a, int count) {  // a barrier before the first use
#ifdef __CUDACC__
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(a);
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
#else
  host::begin_arrivals(&a->state, count);
#endif
}

DPO_DEVICE void arrive(Arrivals* a) {
#ifdef __CUDACC__
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(a);
  asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(at) : "memory");
#else
  host::arrive(&a->state);
#endif
}

DPO_DEVICE bool arrived(const Arrivals* a, unsigned round) {
#ifdef __CUDACC__
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(a);
  uint32_t yes;
  asm volatile(
      "{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(yes)
      : "r"(at), "r"(round & 1)
      : "memory");
  return yes;
#else
  return host::arrived(&a->state, round);
#endif
}

// Waits asleep where the device can.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DPO_WAIT "try_wait"
#else
#define DPO_WAIT "test_wait"
#endif

DPO_DEVICE void wait_for(const Arrivals* a, unsigned round) {
#ifdef __CUDACC__
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(a);
  for (;;) {
    uint32_t yes;
    asm volatile("{.reg .pred p; mbarrier." DPO_WAIT
                 ".parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(yes)
                 : "r"(at), "r"(round & 1)
                 : "memory");
    if (yes) break;
    __nanosleep(32);
  }
#else
  host::wait_for(&a->state, round);
#endif
}

// ---- arithmetic ---------------------------------------------------------------------------------

DPO_DEVICE float exp2_fast(float x) {  // 2 ulp; below 2^-126: 0
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

DPO_DEVICE float reciprocal(float x) {  // 1 ulp; of inf: 0
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// zz, what is summed: the tanh of softcap, or the logit, with the sign of the factor put into x by
// `Elements::unpack`, so that z = zz * unit with unit >= 0.
struct Scaling {
  uint32_t sign;  // to flip x by
  float inner;  // zz = tanh(inner x)
  float limit;  // |x| from which tanh is no polynomial
  float k;  // powers of two per zz
  float chain;  // dz/dx apart from 1 - tanh^2
  double unit;

  static Scaling of(const Transform& t) {
    const double factor = t.scale * t.inv_temperature;
    Scaling s;
    s.sign = (t.softcap ? t.scale : factor) < 0 ? 0x80000000u : 0;
    s.inner = t.softcap ? (float)std::fabs(t.scale / t.softcap) : 0.0f;
    s.limit = s.inner > 0 ? 1.0f / s.inner : INF;
    s.unit = t.softcap ? t.softcap * t.inv_temperature : std::fabs(factor);
    s.k = (float)(s.unit * 1.4426950408889634);
    s.chain = (float)factor;
    return s;
  }
};

// tanh(inner x) where |x| is below the limit: a polynomial of a^2 up to 1, within 2e-8. Constants
// stand in the instructions: in registers they made them wait for each other.
DPO_DEVICE float tanh_near(const Scaling& s, float x) {
  const float a = s.inner * x, q = a * a;
  float p = -4.206954938640047e-4f;
  p = p * q + 2.510459325218389e-3f;
  p = p * q - 8.218921897791421e-3f;
  p = p * q + 2.166011537475899e-2f;
  p = p * q - 5.393478885089249e-2f;
  p = p * q + 1.333312852078639e-1f;
  p = p * q - 3.333333125201679e-1f;
  return a * (p * q + 1.0f);
}

// tanh(inner x) of any x; `slope`: 1 - tanh^2.
DPO_DEVICE float tanh_any(const Scaling& s, float x, float& slope) {
  const float near = tanh_near(s, x);
  const float power = exp2_fast(2.8853900817779268f * s.inner * fabsf(x));
  const float far = 1.0f - 2.0f * reciprocal(power + 1.0f);
  const bool wide = fabsf(x) >= s.limit;
  slope = wide ? (1.0f - far) * (1.0f + far) : 1.0f - near * near;
  return wide ? copysignf(far, x) : near;
}

template <bool SOFTCAP>
DPO_DEVICE float scaled(const Scaling& s, float x) {
  float slope;
  return SOFTCAP ? tanh_any(s, x, slope) : x;
}

// The logit with the sign of the factor.
template <class T>
DPO_DEVICE float turned(const Scaling& s, T x) {
  return as_float(as_bits(Elements<T>::widen(x)) ^ s.sign);
}

// ---- reductions over a warp, in a fixed order ---------------------------------------------------

DPO_DEVICE float warp_max(float x) {
#pragma unroll
  for (int d = WARP / 2; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, d));
  return x;
}

DPO_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int d = WARP / 2; d; d /= 2) x += __shfl_xor_sync(FULL, x, d);
  return x;
}

// ---- launching ----------------------------------------------------------------------------------

inline cudaError_t multiprocessors(int device, int& n) {
  return cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
}

// Runs f with `to.device` current, for this copy of the CUDA runtime too; null, or the error.
template <class F>
const char* on_device(Stream to, F f) {
  int before = to.device;
  cudaError_t e = cudaGetDevice(&before);
  if (e == cudaSuccess && before != to.device) e = cudaSetDevice(to.device);
  if (e == cudaSuccess) e = f();
  if (before != to.device) cudaSetDevice(before);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

// One kernel on `stream`; its launch error, if any.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                   void* stream, Arguments... arguments) {
#ifdef __CUDACC__
  if (shared > 48 * 1024) {
    const cudaError_t e = cudaFuncSetAttribute(
        (const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (e != cudaSuccess) return e;
  }
  kernel<<<grid, threads, shared, (cudaStream_t)stream>>>(arguments...);
  return cudaGetLastError();
#else
  (void)stream;
  host::launch(grid, threads, shared, [=] { kernel(arguments...); });
  return cudaSuccess;
#endif
}

}  // namespace cuda
}  // namespace dpo
