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

// How a dtype lies in a 16-byte vector.
template <class T>
struct Elements;

template <>
struct Elements<float> {
  static constexpr int N = 4;
  static DPO_DEVICE void unpack(const Vec& v, float* x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = as_float(v.w[i]);
  }
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
  static DPO_DEVICE void unpack(const Vec& v, float* x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = as_float(v.w[i] << 16);
      x[2 * i + 1] = as_float(v.w[i] & 0xffff0000u);
    }
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
  static DPO_DEVICE void unpack(const Vec& v, float* x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = one(v.w[i] & 0xffffu);
      x[2 * i + 1] = one(v.w[i] >> 16);
    }
  }
  static DPO_DEVICE Vec pack(const float* x) {
    Vec v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = pair(x[2 * i], x[2 * i + 1]);
    return v;
  }
  static DPO_DEVICE float widen(f16 x) { return one(x.bits); }
  static DPO_DEVICE f16 narrow(float x) { return {(uint16_t)pair(x, 0.0f)}; }
};

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

// Written once and not read here again.
DPO_DEVICE void store_streaming(Vec* p, const Vec& v) {
#ifdef __CUDACC__
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]),
               "r"(v.w[2]), "r"(v.w[3])
               : "memory");
#else
  *p = v;
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

// tanh of each: a polynomial near 0 (no cancellation), 1 - 2 / (exp(2a) + 1) elsewhere. After
// Cephes. Most groups lie near 0 (softcaps are wide): they pay for no special function.
template <int N>
DPO_DEVICE void tanh_exact(float (&a)[N]) {
  float near[N];
  bool wide = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float q = a[i] * a[i];
    float p = -5.70498872745e-3f;
    p = p * q + 2.06390887954e-2f;
    p = p * q - 5.37397155531e-2f;
    p = p * q + 1.33314422036e-1f;
    p = p * q - 3.33332819422e-1f;
    near[i] = a[i] + a[i] * q * p;
    wide = wide || fabsf(a[i]) >= 0.625f;
  }
  if (wide) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float size = fabsf(a[i]);
      const float far = 1.0f - 2.0f * reciprocal(exp2_fast(2.8853900817779268f * size) + 1.0f);
      near[i] = size >= 0.625f ? copysignf(far, a[i]) : near[i];
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = near[i];
}

// zz, what is summed: softcap's output, or the logit with the sign of its factor, so that
// z = zz * unit with unit >= 0.
struct Scaling {
  float inner, outer;  // zz = outer tanh(inner x), or outer x with outer = +-1
  float k;  // powers of two per zz
  float chain;  // dz/dx apart from 1 - tanh^2
  double unit;

  static Scaling of(const Transform& t) {
    const double factor = t.scale * t.inv_temperature;
    Scaling s;
    s.unit = t.softcap ? t.inv_temperature : std::fabs(factor);
    s.inner = t.softcap ? (float)(t.scale / t.softcap) : 0.0f;
    s.outer = t.softcap ? (float)t.softcap : factor < 0 ? -1.0f : 1.0f;
    s.k = (float)(s.unit * 1.4426950408889634);
    s.chain = (float)factor;
    return s;
  }
};

template <bool SOFTCAP, int N>
DPO_DEVICE void scaled(const Scaling& s, const float (&x)[N], float (&zz)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) zz[i] = SOFTCAP ? s.inner * x[i] : s.outer * x[i];
  if constexpr (SOFTCAP) {
    tanh_exact(zz);
#pragma unroll
    for (int i = 0; i < N; ++i) zz[i] *= s.outer;
  }
}

template <bool SOFTCAP>
DPO_DEVICE float scaled(const Scaling& s, float x) {
  float zz[1] = {x};
  scaled<SOFTCAP>(s, zz, zz);
  return zz[0];
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
