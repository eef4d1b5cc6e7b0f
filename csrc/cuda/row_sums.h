// The running sums of a row's softmax: what a thread, a warp, a part of a row carries, and how two
// of them become one. A sum is in fp64 and is rescaled only when the maximum rises.
#pragma once

#include "device.h"

namespace dpo {
namespace cuda {

// exp2((zz - m) k) summed over some columns, and what the statistics need.
template <bool STATS>
struct Sums {
  float m = -FLT_MAX;  // not -inf: -inf - -inf is NaN
  double l = 0;
};

template <>
struct Sums<true> : Sums<false> {
  double weighted = 0, squares = 0, total = 0;  // of e (zz - m), of e^2, of zz
  float beaten = 0;                             // 1: a column before the target ties with it
};

struct Partial {
  double l, weighted, squares, total;
  float m, beaten;
};

template <bool STATS>
DPO_DEVICE Partial as_partial(const Sums<STATS>& s) {
  if constexpr (STATS) return {s.l, s.weighted, s.squares, s.total, s.m, s.beaten};
  return {s.l, 0, 0, 0, s.m, 0};
}

template <bool STATS>
DPO_DEVICE Sums<STATS> as_sums(const Partial& p) {
  Sums<STATS> s;
  s.m = p.m;
  s.l = p.l;
  if constexpr (STATS) {
    s.weighted = p.weighted;
    s.squares = p.squares;
    s.total = p.total;
    s.beaten = p.beaten;
  }
  return s;
}

// Written by another block in this launch.
template <bool STATS>
DPO_DEVICE Sums<STATS> load_sums(const Partial* p) {
  if constexpr (STATS)
    return as_sums<STATS>({load_cross_block(&p->l), load_cross_block(&p->weighted),
                           load_cross_block(&p->squares), load_cross_block(&p->total),
                           load_cross_block(&p->m), load_cross_block(&p->beaten)});
  return as_sums<STATS>({load_cross_block(&p->l), 0, 0, 0, load_cross_block(&p->m), 0});
}

template <bool STATS>
DPO_DEVICE void raise_max(Sums<STATS>& s, float top, float k) {
  if (s.l != 0) {
    const float drop = s.m - top;
    const double f = exp2_fast(drop * k);
    if constexpr (STATS) {
      s.weighted = f * (s.weighted + s.l * drop);
      s.squares *= f * f;
    }
    s.l *= f;
  }
  s.m = top;
}

// Adds logits as scaled; `top` is the largest, `column(i)` that of the i-th.
template <bool STATS, int N, class Column>
DPO_DEVICE void add_scaled(Sums<STATS>& s, const float (&z)[N], float top, const Scaling& c,
                           float zy, int y, Column column) {
  if (top > s.m) raise_max(s, top, c.k);
  if constexpr (STATS) {
    // A tie with the target matters only while nothing was larger, and then it is the group's
    // maximum: few groups look at their columns.
    if (top == zy && s.m == zy) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (z[i] == zy && column(i) < y) s.beaten = 1.0f;
    }
  }
  constexpr int CHAINS = N < 4 ? N : 4;
  float sum[CHAINS] = {};
  float weighted = 0, squares = 0, total = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float d = z[i] - s.m, e = exp2_fast(d * c.k);
    sum[i % CHAINS] += e;
    if constexpr (STATS) {
      weighted += e * d;
      squares += e * e;
      total += z[i];
    }
  }
#pragma unroll
  for (int i = 1; i < CHAINS; ++i) sum[0] += sum[i];
  s.l += (double)sum[0];
  if constexpr (STATS) {
    if (weighted != weighted) {  // -inf times a weight of 0: looked for once a group
      weighted = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float d = z[i] - s.m;
        weighted += exp2_fast(d * c.k) * fmaxf(d, -1e30f);
      }
    }
    s.weighted += weighted;
    s.squares += squares;
    s.total += total;
  }
}

// Adds the elements of vectors.
template <class T, bool SOFTCAP, bool STATS, int VECTORS, class Column>
DPO_DEVICE void add(Sums<STATS>& s, const Vec (&v)[VECTORS], const Scaling& c, float zy, int y,
                    Column column) {
  constexpr int N = Elements<T>::N;
  float z[VECTORS * N];
  float top;
  if constexpr (SOFTCAP) {
    const float high = largest<T>(v), low = smallest<T>(v);
    top = c.sign ? -low : high;  // softcap keeps the order
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) Elements<T>::unpack(v[i], z + i * N, c.sign);
    if (high >= c.limit || low <= -c.limit) {
      top = scaled<true>(c, top);
#pragma unroll
      for (int i = 0; i < VECTORS * N; ++i) z[i] = scaled<true>(c, z[i]);
    } else {
      top = tanh_near(c, top);
#pragma unroll
      for (int i = 0; i < VECTORS * N; ++i) z[i] = tanh_near(c, z[i]);
    }
  } else {
    top = c.sign ? -smallest<T>(v) : largest<T>(v);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) Elements<T>::unpack(v[i], z + i * N, c.sign);
  }
  add_scaled(s, z, top, c, zy, y, column);
}

// Adds one.
template <bool SOFTCAP, bool STATS>
DPO_DEVICE void add_one(Sums<STATS>& s, float x, const Scaling& c, float zy, int y, int column) {
  const float z[1] = {scaled<SOFTCAP>(c, x)};
  add_scaled(s, z, z[0], c, zy, y, [column](int) { return column; });
}

// The sums of a warp's lanes, in every lane.
template <bool STATS>
DPO_DEVICE void merge_warp(Sums<STATS>& s, float k) {
  raise_max(s, warp_max(s.m), k);
  s.l = warp_sum(s.l);
  if constexpr (STATS) {
    s.weighted = warp_sum(s.weighted);
    s.squares = warp_sum(s.squares);
    s.total = warp_sum(s.total);
    s.beaten = warp_max(s.beaten);
  }
}

}  // namespace cuda
}  // namespace dpo
