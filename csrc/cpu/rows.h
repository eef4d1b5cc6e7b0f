// What the row kernels share: sums of exponentials by blocks, widening, and the slope of a logit.
//
// Included by sources that are compiled once per instruction set, inside dpo::DPO_ISA.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../params.h"
#include "simd.h"

namespace dpo {
namespace DPO_ISA {
namespace {

constexpr double LOG2E = 1.4426950408889634;
constexpr double LN2 = 0.6931471805599453;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t BLOCK = 2048;        // elements kept in L1 between the two passes
constexpr int64_t SEGMENT = 8 * BLOCK; // elements one thread takes at least

struct Sum {            // of 2^((x - m) k) over some columns
  double m = 0;
  double l = 0;         // 0: nothing yet
};

inline Sum combine(Sum a, Sum b, double k) {
  if (std::isnan(a.l) || std::isnan(b.l)) return {0, NAN};
  if (b.l == 0) return a;
  if (a.l == 0) return b;
  if ((b.m - a.m) * k <= 0) return {a.m, a.l + b.l * std::exp2((b.m - a.m) * k)};
  return {b.m, b.l + a.l * std::exp2((a.m - b.m) * k)};
}

template <class T>
bool has_nan(const T* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    if (std::isnan(load_one(x + j))) return true;
  return false;
}

template <class T>
float block_max(const T* x, int64_t n) {
  F a = splat(-INF), b = a, c = a, d = a;
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    a = max(load(x + j), a);
    b = max(load(x + j + W), b);
    c = max(load(x + j + 2 * W), c);
    d = max(load(x + j + 3 * W), d);
  }
  for (; j + W <= n; j += W) a = max(load(x + j), a);
  if (j < n) b = max(load_tail(x + j, n - j, -INF), b);
  return horizontal_max(max(max(a, b), max(c, d)));
}

template <class T>
float block_min(const T* x, int64_t n) {
  F a = splat(INF);
  int64_t j = 0;
  for (; j + W <= n; j += W) a = min(load(x + j), a);
  if (j < n) a = min(load_tail(x + j, n - j, INF), a);
  return -horizontal_max(-a);
}

template <class T>
double block_sum(const T* x, int64_t n, float k, float m) {
  F s0 = splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
  const F vk = splat(k), vm = splat(m);
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    s0 += exp2((load(x + j) - vm) * vk);
    s1 += exp2((load(x + j + W) - vm) * vk);
    s2 += exp2((load(x + j + 2 * W) - vm) * vk);
    s3 += exp2((load(x + j + 3 * W) - vm) * vk);
  }
  for (; j + W <= n; j += W) s0 += exp2((load(x + j) - vm) * vk);
  double sum = horizontal_sum((s0 + s1) + (s2 + s3));
  if (j < n) {
    F e = exp2((load_tail(x + j, n - j, m) - vm) * vk);
    for (int i = 0; i < n - j; ++i) sum += e[i];
  }
  return sum;
}

// Adds one block, of any sign of k, to the running sum.
template <class T>
void add_block(Sum& sum, const T* x, int64_t n, float k) {
  const float m = k >= 0 ? block_max(x, n) : block_min(x, n);
  if (m * k == -INF) {  // exp(z) is 0 throughout: nothing to add, unless a NaN hides among them
    if (has_nan(x, n)) sum.l = NAN;
    return;
  }
  sum = combine(sum, {(double)m, block_sum(x, n, k, m)}, k);
}

// A block in fp32: softcap's z, and dz/dx if asked; x itself where there is no softcap.
template <class T>
void widen(const T* x, int64_t n, const Transform& t, float* z, float* slope) {
  const F outer = splat((float)(t.softcap * t.inv_temperature));
  const F inner = splat((float)(t.softcap ? t.scale / t.softcap : 0.0));
  const F chain = splat((float)(t.scale * t.inv_temperature));
  for (int64_t j = 0; j < n; j += W) {
    F v = j + W <= n ? load(x + j) : load_tail(x + j, n - j, 0.0f);
    if (t.softcap) {
      v = tanh(v * inner);
      if (slope) store(slope + j, chain * ((1.0f - v) * (1.0f + v)));
      v *= outer;
    }
    store(z + j, v);
  }
}

// The value of one column as the sums see it. The target must carry the very same rounding as its
// own term of the sum: a more exact one would make confident tokens worse, log-probs above 0.
template <class T>
double value_of(const T* x, const Transform& t) {
  float z[W];
  widen(x, 1, t, z, nullptr);
  return z[0];
}

// dz per unit of that value.
inline double factor(const Transform& t) { return t.softcap ? 1.0 : t.scale * t.inv_temperature; }

inline double slope_one(double x, const Transform& t) {
  const double chain = t.scale * t.inv_temperature;
  if (!t.softcap) return chain;
  const double th = std::tanh(x * t.scale / t.softcap);
  return chain * (1 - th) * (1 + th);
}

template <class T>
void fill(T* out, int64_t n, float value) {
  if (value == 0) {
    std::memset((void*)out, 0, n * sizeof(T));
    return;
  }
  for (int64_t j = 0; j < n; ++j) store_one(out + j, value);
}

// A fresh gradient of hundreds of megabytes costs more in page faults than in arithmetic: ask for
// 2 MiB pages. Advice only: where it cannot be followed nothing changes.
inline void advise_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, from = ((uintptr_t)start + page - 1) / page * page;
  const uintptr_t to = ((uintptr_t)start + bytes) / page * page;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

// The rows of `targets` to compute, those that are scored; `blank(row, value)` is told the others.
template <class Blank>
std::vector<int64_t> scored_rows(const int64_t* targets, int64_t rows, int64_t V,
                                 int64_t ignore_index, Blank blank) {
  std::vector<int64_t> scored;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t y = targets[row];
    if (y == ignore_index)
      blank(row, 0.0f);
    else if (y < 0 || y >= V)
      blank(row, NAN);
    else
      scored.push_back(row);
  }
  return scored;
}

// finish(row, part) of each row, where part is combine() of segment(row, first column, columns) in
// the order of the columns, however many threads share a row.
template <class Part, class Segment, class Finish>
void reduce_rows(const std::vector<int64_t>& scored, int64_t V, double k, Segment segment,
                 Finish finish) {
  const int64_t rows = (int64_t)scored.size(), segments = (V + SEGMENT - 1) / SEGMENT;
  if (rows >= 4 * (int64_t)omp_get_max_threads() || segments == 1) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < rows; ++i) {
      Part r;
      for (int64_t s = 0; s < segments; ++s)
        r = combine(r, segment(scored[i], s * SEGMENT, std::min(SEGMENT, V - s * SEGMENT)), k);
      finish(scored[i], r);
    }
    return;
  }
  std::vector<Part> parts(rows * segments);  // few rows: threads share each
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t part = 0; part < rows * segments; ++part) {
    const int64_t first = (part % segments) * SEGMENT;
    parts[part] = segment(scored[part / segments], first, std::min(SEGMENT, V - first));
  }
  for (int64_t i = 0; i < rows; ++i) {
    Part r;
    for (int64_t s = 0; s < segments; ++s) r = combine(r, parts[i * segments + s], k);
    finish(scored[i], r);
  }
}

}  // namespace
}  // namespace DPO_ISA
}  // namespace dpo
