// The gradient of the logits: one read and one write of the scored rows, one write of the others.
//
// A block takes a part of a row, rows from the last to the first: the last rows the forward read may
// still lie in the L2 cache. Parts are equal and begin on a line of 128 bytes wherever the row does.
// What all of a row's elements share is computed once a block, in fp64.
#include "device.h"

namespace dpo {
namespace cuda {
// Named, not anonymous: nvcc would put a hash of this file's path into the kernels' names.
inline namespace token_logps_backward_kernels {

#ifndef DPO_BACKWARD_CONFIG  // threads, 16-byte vectors a thread loads at once, rounds, blocks an SM
#define DPO_BACKWARD_CONFIG 256, 4, 2, 4
#endif

template <int THREADS_, int VECTORS_, int ROUNDS_, int BLOCKS_>
struct Config {
  static constexpr int THREADS = THREADS_, VECTORS = VECTORS_, ROUNDS = ROUNDS_, BLOCKS = BLOCKS_;
  static constexpr int TILE = THREADS * VECTORS * ROUNDS;  // vectors, about
};
using Backward = Config<DPO_BACKWARD_CONFIG>;

struct Arguments {
  TokenLogpsBackward p;
  Scaling scaling;
  int rows, V, tiles;
};

// What a row's elements share: d = exp2((zz - m) k) factor (1 - tanh^2), and at the target
// at_target (1 - tanh^2).
struct Row {
  int y;  // -1: every element is `fill`
  float m, factor, at_target, fill;
};

DPO_DEVICE Row row_of(const Arguments& a, int index) {
  const TokenLogpsBackward& p = a.p;
  Row row{-1, 0, 0, 0, 0};
  const int64_t y = p.targets[index];
  if (y == p.ignore_index) return row;
  const double g = p.grad[index];
  if (g == 0) return row;
  if (y < 0 || y >= p.V) {
    row.fill = NAN;
    return row;
  }
  const double unit = a.scaling.unit, lse = p.lse[index];
  // With unit = 0 (logit_scale = 0) the softmax is flat and the chain is 0.
  const double exact = unit == 0 ? 0 : lse / unit;
  row.y = (int)y;
  row.m = (float)exact;
  row.factor = (float)(-g * a.scaling.chain * exp2(((double)row.m - exact) * a.scaling.k));
  row.at_target = (float)(g * a.scaling.chain);
  return row;
}

// 1 - p without cancellation (confident tokens are DPO's regime), from the logit in a register: in
// place another thread must not read it. One thread of the row comes here.
DPO_DEVICE_COLD float target_factor(double zz, double unit, double lse) {
  return (float)-expm1(zz * unit - lse);
}

template <bool SOFTCAP, int N>
DPO_DEVICE void gradient(const Arguments& a, const Row& row, int index, int column, float (&x)[N]) {
  const Scaling& c = a.scaling;
  const bool has_target = row.y >= column && row.y < column + N;
  if constexpr (SOFTCAP) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= c.inner;
    tanh_exact(x);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float z = c.outer * x[i];
    float d = exp2_fast((z - row.m) * c.k) * row.factor;
    if (has_target && column + i == row.y)
      d = target_factor(z, c.unit, a.p.lse[index]) * row.at_target;
    x[i] = SOFTCAP ? d * ((1.0f - x[i]) * (1.0f + x[i])) : d;
  }
}

constexpr int LINE = 8;  // vectors

// The first of n lines that belongs to a part.
DPO_DEVICE int line_of(int n, int part, int parts) { return (int)((int64_t)n * part / parts); }

// T: dtype of the logits; O: of the gradient, as wide or narrower.
template <class T, class O, bool SOFTCAP, class C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    backward(const __grid_constant__ Arguments a) {
  constexpr int N = Elements<O>::N, LOADS = N / Elements<T>::N;
  constexpr int VECTORS = C::VECTORS / LOADS, STEP = VECTORS * C::THREADS;
  const TokenLogpsBackward& p = a.p;
  const int block = blockIdx.x, index = a.rows - 1 - block / a.tiles, tile = block % a.tiles;
  const int thread = threadIdx.x;
  const T* x = row_at((const T*)p.logits, p.stride_r, p.stride_t, p.T, index);
  O* out = row_at((O*)p.out, p.out_stride_r, p.out_stride_t, p.T, index);
  Row& shared = *(Row*)shared_memory();
  if (thread == 0) shared = row_of(a, index);
  __syncthreads();
  const Row row = shared;
  const Span span = span_of(out, a.V);  // stores are whole vectors; loads too if x lies alike
  const T* from = x + span.head;
  const bool alike = ((uintptr_t)from & 15) == 0;
  Vec* to = (Vec*)(out + span.head);

  if (tile == 0) {  // what lies outside the whole vectors, an element a thread
    int column = -1;
    if (thread < span.head) column = thread;
    if (thread >= N && thread - N < span.tail) column = a.V - span.tail + thread - N;
    if (column >= 0) {
      float value[1] = {row.fill};
      if (row.y >= 0) {
        value[0] = Elements<T>::widen(x[column]);
        gradient<SOFTCAP>(a, row, index, column, value);
      }
      out[column] = Elements<O>::narrow(value[0]);
    }
  }
  const int before = (int)(((uintptr_t)to >> 4) & (LINE - 1));  // vectors of the row's first line
  const int lines = (before + span.vectors + LINE - 1) / LINE;
  const int first = line_of(lines, tile, a.tiles) * LINE - before + thread;
  const int last = line_of(lines, tile + 1, a.tiles) * LINE - before;
  const int end = last < span.vectors ? last : span.vectors;
  if (row.y < 0) {
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = row.fill;
    const Vec v = Elements<O>::pack(values);
    for (int j = first; j < end; j += C::THREADS)
      if (j >= 0) store_streaming(to + j, v);
    return;
  }
  for (int start = first; start < end; start += STEP) {
    Vec loaded[VECTORS][LOADS];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const int v = start + j * C::THREADS;
      if (v < 0 || v >= end) continue;
#pragma unroll
      for (int l = 0; l < LOADS; ++l) {
        const T* part = from + v * N + l * Elements<T>::N;
        if (alike) {
          loaded[j][l] = load_once((const Vec*)part);
        } else {
          float values[Elements<T>::N];
#pragma unroll
          for (int i = 0; i < Elements<T>::N; ++i) values[i] = Elements<T>::widen(part[i]);
          loaded[j][l] = Elements<T>::pack(values);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const int v = start + j * C::THREADS;
      if (v < 0 || v >= end) continue;
      float values[N];
#pragma unroll
      for (int l = 0; l < LOADS; ++l)
        Elements<T>::unpack(loaded[j][l], values + l * Elements<T>::N);
      gradient<SOFTCAP>(a, row, index, span.head + v * N, values);
      store_streaming(to + v, Elements<O>::pack(values));
    }
  }
}

template <class T, class O>
cudaError_t run(Arguments a, void* stream) {
  const int vectors = a.V / Elements<O>::N;
  a.tiles = (vectors + Backward::TILE / 2) / Backward::TILE;
  if (a.tiles < 1) a.tiles = 1;
  const int64_t blocks = (int64_t)a.rows * a.tiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel =
      a.p.transform.softcap != 0 ? backward<T, O, true, Backward> : backward<T, O, false, Backward>;
  return launch(kernel, dim3((unsigned)blocks), Backward::THREADS, sizeof(Row), stream, a);
}

}  // namespace token_logps_backward_kernels

const char* token_logps_backward(const TokenLogpsBackward& p, Stream to) {
  if (const char* why = too_large(p.R * p.T, p.V)) return why;
  if (p.dtype != p.out_dtype && p.dtype != DType::f32)
    return "the gradient's dtype must be that of the logits, or narrower than fp32";
  Arguments a;
  a.p = p;
  a.scaling = Scaling::of(p.transform);
  a.rows = (int)(p.R * p.T);
  a.V = (int)p.V;
  a.tiles = 1;
  if (a.rows == 0 || p.V == 0) return nullptr;
  return on_device(to, [&] {
    if (p.dtype == DType::f32 && p.out_dtype == DType::bf16) return run<float, bf16>(a, to.stream);
    if (p.dtype == DType::f32 && p.out_dtype == DType::f16) return run<float, f16>(a, to.stream);
    switch (p.dtype) {
      case DType::f32: return run<float, float>(a, to.stream);
      case DType::bf16: return run<bf16, bf16>(a, to.stream);
      default: return run<f16, f16>(a, to.stream);
    }
  });
}

}  // namespace cuda
}  // namespace dpo
