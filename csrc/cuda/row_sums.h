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

// Adds n logits; `column(i)` is that of the i-th.
template <bool SOFTCAP, bool STATS, int N, class Column>
DPO_DEVICE void add(Sums<STATS>& s, const float (&x)[N], const Scaling& c, float zy, int y,
                    Column column) {
  float z[N];
  scaled<SOFTCAP>(c, x, z);
  float top = z[0];
#pragma unroll
  for (int i = 1; i < N; ++i) top = fmaxf(top, z[i]);  // passes over NaN; exp2 below does not
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
  float sum[2] = {0, 0};
  float weighted = 0, squares = 0, total = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float d = z[i] - s.m, e = exp2_fast(d * c.k);
    sum[i % 2] += e;
    if constexpr (STATS) {
      weighted += e * fmaxf(d, -1e30f);  // -inf times a weight of 0 would be NaN
      squares += e * e;
      total += z[i];
    }
  }
  s.l += (double)(sum[0] + sum[1]);
  if constexpr (STATS) {
    s.weighted += weighted;
    s.squares += squares;
    s.total += total;
  }
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
