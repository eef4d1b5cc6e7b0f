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

// Plain stores: streaming ones were up to 4 % slower on an H200.
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
// (1 - p) at_target (1 - tanh^2).
struct Row {
  float m, factor, at_target;
};

DPO_DEVICE Row row_of(const Arguments& a, double g, double lse) {
  const double unit = a.scaling.unit;
  // With unit = 0 (logit_scale = 0) the softmax is flat and the chain is 0.
  const double exact = unit == 0 ? 0 : lse / unit;
  Row row;
  row.m = (float)exact;
  row.factor = (float)(-g * a.scaling.chain * exp2(((double)row.m - exact) * a.scaling.k));
  row.at_target = (float)(g * a.scaling.chain);
  return row;
}

// Of logits that are not the target, turned; `wide`: some may lie beyond softcap's limit.
template <bool SOFTCAP, int N>
DPO_DEVICE void gradient(const Scaling& c, const Row& row, bool wide, float (&x)[N]) {
  float factor[N];  // times 1 - tanh^2
#pragma unroll
  for (int i = 0; i < N; ++i) factor[i] = row.factor;
  if constexpr (SOFTCAP) {
    if (wide) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float slope;
        x[i] = tanh_any(c, x[i], slope);
        factor[i] *= slope;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] = tanh_near(c, x[i]);
        factor[i] -= x[i] * row.factor * x[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = exp2_fast((x[i] - row.m) * c.k) * factor[i];
}

// 1 - p without cancellation (confident tokens are DPO's regime).
template <bool SOFTCAP>
DPO_DEVICE float target_gradient(const Scaling& c, const Row& row, double lse, float x) {
  float slope = 1.0f;
  const float z = SOFTCAP ? tanh_any(c, x, slope) : x;
  return (float)-expm1((double)z * c.unit - lse) * row.at_target * slope;
}

// The first of n lines that belongs to a part.
DPO_DEVICE int line_of(int n, int part, int parts) { return (int)((int64_t)n * part / parts); }

// A vector that does not lie on 16 bytes, element by element.
template <class T>
DPO_DEVICE Vec gather(const T* from) {
  float values[Elements<T>::N];
#pragma unroll
  for (int i = 0; i < Elements<T>::N; ++i) values[i] = Elements<T>::widen(from[i]);
  return Elements<T>::pack(values);
}

// T: dtype of the logits; O: of the gradient, as wide or narrower.
template <class T, class O, bool SOFTCAP, class C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    backward(const __grid_constant__ Arguments a) {
  constexpr int N = Elements<O>::N, LOADS = N / Elements<T>::N;
  constexpr int VECTORS = C::VECTORS / LOADS, STEP = VECTORS * C::THREADS;
  const TokenLogpsBackward& p = a.p;
  const int block = blockIdx.x, index = a.rows - 1 - block / a.tiles, tile = block % a.tiles;
  const int thread = threadIdx.x;
  // Independent loads, all on their way before the first is waited for.
  const int64_t y = p.targets[index];
  const float g = p.grad[index];
  const double lse = p.lse[index];
  const T* x = row_at((const T*)p.logits, p.stride_r, p.stride_t, p.T, index);
  O* out = row_at((O*)p.out, p.out_stride_r, p.out_stride_t, p.T, index);
  const Span span = span_of(out, a.V);  // stores are whole vectors; loads too if x lies alike
  const T* from = x + span.head;
  const bool alike = ((uintptr_t)from & 15) == 0;
  Vec* to = (Vec*)(out + span.head);
  const int before = (int)(((uintptr_t)to >> 4) & (LINE - 1));  // vectors of the row's first line
  const int lines = (before + span.vectors + LINE - 1) / LINE;
  const int first = line_of(lines, tile, a.tiles) * LINE - before;  // below 0: before the row
  const int last = line_of(lines, tile + 1, a.tiles) * LINE - before;
  const int end = last < span.vectors ? last : span.vectors;
  int start = first + thread;
  int edge = -1;  // a column outside the whole vectors, an element a thread
  if (tile == 0) {
    if (thread < span.head) edge = thread;
    if (thread >= N && thread - N < span.tail) edge = a.V - span.tail + thread - N;
  }

  const bool ignored = y == p.ignore_index || g == 0;
  if (ignored || y < 0 || y >= p.V) {  // the same for the whole block
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = ignored ? 0.0f : NAN;
    const Vec v = Elements<O>::pack(values);
    if (edge >= 0) out[edge] = Elements<O>::narrow(values[0]);
    for (; start < end; start += C::THREADS)
      if (start >= 0) to[start] = v;
    return;
  }
  Vec loaded[VECTORS][LOADS];
  auto load = [&] {
    if (alike) {
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) {
        const int v = start + j * C::THREADS;
        if ((unsigned)v >= (unsigned)end) continue;
#pragma unroll
        for (int l = 0; l < LOADS; ++l)
          loaded[j][l] = load_once((const Vec*)(from + v * N) + l);
      }
    } else {
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) {
        const int v = start + j * C::THREADS;
        if ((unsigned)v >= (unsigned)end) continue;
#pragma unroll
        for (int l = 0; l < LOADS; ++l)
          loaded[j][l] = gather(from + v * N + l * Elements<T>::N);
      }
    }
  };
  if (end > 0) load();  // on their way while the row's numbers are made
  // The target's element is written again by the thread that writes its vector: what it needs is
  // read here, before anything is written.
  const int target = (int)y - span.head;
  const bool in_tile = target >= 0 && target / N >= first && target / N < end;
  const bool owner = in_tile && (target / N - first) % C::THREADS == thread;
  float at_edge[1] = {0}, at_target = 0;
  if (edge >= 0) at_edge[0] = turned(a.scaling, x[edge]);
  if (owner) at_target = turned(a.scaling, x[y]);
  Row& shared = *(Row*)shared_memory();
  if (thread == 0) shared = row_of(a, g, lse);
  __syncthreads();
  const Row row = shared;
  for (; start < end; start += STEP) {
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const int v = start + j * C::THREADS;
      if ((unsigned)v >= (unsigned)end) continue;
      float values[N];
      bool wide = false;
      if constexpr (SOFTCAP)
        wide = largest<T>(loaded[j]) >= a.scaling.limit ||
               smallest<T>(loaded[j]) <= -a.scaling.limit;
#pragma unroll
      for (int l = 0; l < LOADS; ++l)
        Elements<T>::unpack(loaded[j][l], values + l * Elements<T>::N, a.scaling.sign);
      gradient<SOFTCAP>(a.scaling, row, wide, values);
      to[v] = Elements<O>::pack(values);
    }
    if (start + STEP < end) {
      start += STEP;
      load();
      start -= STEP;
    }
  }
  if (owner)
    out[y] = Elements<O>::narrow(target_gradient<SOFTCAP>(a.scaling, row, lse, at_target));
  if (edge >= 0) {
    if (edge == y)
      at_edge[0] = target_gradient<SOFTCAP>(a.scaling, row, lse, at_edge[0]);
    else
      gradient<SOFTCAP>(a.scaling, row, true, at_edge);
    out[edge] = Elements<O>::narrow(at_edge[0]);
  }
}

template <class T, class O>
cudaError_t run(Arguments a, void* stream) {
  const int vectors = a.V / Elements<O>::N;
  // A line more at either end: the rounds of a part are never exceeded by a few vectors.
  a.tiles = (vectors + 2 * LINE) / (Backward::TILE - 2 * LINE) + 1;
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
