// Log-prob and log-sum-exp of each scored row, and the gradient of the logits.
//
// Compiled once per instruction set (DPO_ISA names the namespace). A row is cut into segments of
// fixed length; each gives (maximum, sum of 2^(x k - c)) with its own maximum, and the segments are
// combined in order in double. So a row's result does not depend on how many threads share it, nor
// on what else is in the batch. Work is in powers of two: k = log2(e) dz/dx folds scale and
// temperature, and c = k * maximum enters the log-sum-exp exactly as it was rounded in the sum, so
// a large common offset of the logits costs no digits.
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

struct Sum {            // of 2^(x k - c) over some columns
  double c = -INFINITY; // in powers of two; -inf: nothing yet
  double l = 0;
};

Sum combine(Sum a, Sum b) {
  if (std::isnan(a.l) || std::isnan(b.l)) return {0, NAN};
  if (b.c == -INFINITY) return a;
  if (a.c == -INFINITY) return b;
  if (a.c >= b.c) return {a.c, a.l + b.l * std::exp2(b.c - a.c)};
  return {b.c, b.l + a.l * std::exp2(a.c - b.c)};
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
double block_sum(const T* x, int64_t n, float k, float c) {
  F s0 = splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
  const F vk = splat(k), vc = splat(c);
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    s0 += exp2(load(x + j) * vk - vc);
    s1 += exp2(load(x + j + W) * vk - vc);
    s2 += exp2(load(x + j + 2 * W) * vk - vc);
    s3 += exp2(load(x + j + 3 * W) * vk - vc);
  }
  for (; j + W <= n; j += W) s0 += exp2(load(x + j) * vk - vc);
  double sum = horizontal_sum((s0 + s1) + (s2 + s3));
  if (j < n) {
    F e = exp2(load_tail(x + j, n - j, 0.0f) * vk - vc);
    for (int i = 0; i < n - j; ++i) sum += e[i];
  }
  return sum;
}

// Adds one block, of any sign of k, to the running sum.
template <class T>
void add_block(Sum& sum, const T* x, int64_t n, float k) {
  const double top = (double)(k >= 0 ? block_max(x, n) : block_min(x, n)) * k;
  if (top == -INFINITY) {  // all -inf: nothing to add, unless a NaN hides among them
    if (has_nan(x, n)) sum.l = NAN;
    return;
  }
  const float c = (float)top;
  sum = combine(sum, {(double)c, block_sum(x, n, k, c)});
}

// fp32 z = softcap(scale x) inv_temperature of a block, and dz/dx if asked.
template <class T>
void transform_block(const T* x, int64_t n, const Transform& t, float* z, float* slope) {
  const F outer = splat((float)((t.softcap ? t.softcap : t.scale) * t.inv_temperature));
  const F inner = splat((float)(t.softcap ? t.scale / t.softcap : 0.0));
  const F chain = splat((float)(t.scale * t.inv_temperature));
  for (int64_t j = 0; j < n; j += W) {
    F v = j + W <= n ? load(x + j) : load_tail(x + j, n - j, 0.0f);
    if (t.softcap) {
      v = tanh(v * inner);
      if (slope) store(slope + j, chain * ((1.0f - v) * (1.0f + v)));
    } else if (slope) {
      store(slope + j, chain);
    }
    store(z + j, v * outer);
  }
}

// z of one logit in double: the target's, where every digit goes into the log-prob.
double transform_one(double x, const Transform& t) {
  x *= t.scale;
  if (t.softcap) x = t.softcap * std::tanh(x / t.softcap);
  return x * t.inv_temperature;
}

double slope_one(double x, const Transform& t) {
  const double chain = t.scale * t.inv_temperature;
  if (!t.softcap) return chain;
  const double th = std::tanh(x * t.scale / t.softcap);
  return chain * (1 - th) * (1 + th);
}

// One set of a row's statistics over some columns, combined like Sum.
struct Stats {
  Sum sum;
  double weighted = 0;  // of 2^t (z - m), m = c / k
  double squares = 0;   // of 4^t
  double total = 0;     // of z
  bool beaten = false;  // a column comes before the target in the order of argmax
};

Stats combine(const Stats& a, const Stats& b, double k) {
  Stats r;
  r.sum = combine(a.sum, b.sum);
  for (const Stats* s : {&a, &b}) {
    if (s->sum.c == -INFINITY) continue;
    const double shift = s->sum.c - r.sum.c, f = std::exp2(shift);
    r.weighted += f * (s->weighted + s->sum.l * (shift / k));
    r.squares += f * f * s->squares;
  }
  r.total = a.total + b.total;
  r.beaten = a.beaten || b.beaten;
  return r;
}

// The statistics of one block of z starting at column `first`; k = log2(e).
Stats block_stats(const float* z, int64_t n, int64_t first, int64_t y, float zy) {
  Stats r;
  const float k = (float)LOG2E;
  add_block(r.sum, z, n, k);
  double total = 0;
  bool beaten = false;
  for (int64_t j = 0; j < n; ++j) {
    total += z[j];
    beaten |= z[j] > zy || (z[j] == zy && first + j < y);
  }
  r.total = total;
  r.beaten = beaten;
  if (r.sum.c == -INFINITY) return r;
  const float c = (float)r.sum.c, m = (float)(r.sum.c / k);
  F weighted = splat(0.0f), squares = splat(0.0f);
  for (int64_t j = 0; j < n; j += W) {
    F v = j + W <= n ? load(z + j) : load_tail(z + j, n - j, -INF);
    F e = exp2(v * k - c), d = v - m;
    d = d < splat(-1e4f) ? splat(-1e4f) : d;  // -inf times an (underflown) weight is 0
    if (j + W > n)
      for (int i = (int)(n - j); i < W; ++i) e[i] = 0.0f;
    weighted += e * d;
    squares += e * e;
  }
  r.weighted = horizontal_sum(weighted);
  r.squares = horizontal_sum(squares);
  return r;
}

struct Forward {
  const TokenLogps& p;
  const float k;        // x (or z, where a block is transformed first) to powers of two
  const bool buffered;  // blocks are transformed into fp32 first
  const bool stats;

  explicit Forward(const TokenLogps& params)
      : p(params),
        k((float)(LOG2E * (buffer_needed(params) ? 1.0 : factor(params)))),
        buffered(buffer_needed(params)),
        stats(wants_stats(params)) {}

  static double factor(const TokenLogps& p) {
    return p.transform.scale * p.transform.inv_temperature;
  }
  static bool wants_stats(const TokenLogps& p) {
    return p.entropy || p.mean_logits || p.is_top1 || p.log_sum_sq_probs;
  }
  static bool buffer_needed(const TokenLogps& p) {
    return p.transform.softcap != 0 || wants_stats(p) || factor(p) == 0;
  }

  template <class T>
  Stats segment(const T* x, int64_t first, int64_t n, int64_t y) const {
    Stats r;
    float z[BLOCK + W];
    float zy = 0;
    if (stats) {
      transform_block(x + y, 1, p.transform, z, nullptr);
      zy = z[0];
    }
    for (int64_t j = first; j < first + n; j += BLOCK) {
      const int64_t count = std::min(BLOCK, first + n - j);
      if (buffered) transform_block(x + j, count, p.transform, z, nullptr);
      if (stats)
        r = combine(r, block_stats(z, count, j, y, zy), k);
      else if (buffered)
        add_block(r.sum, z, count, k);
      else
        add_block(r.sum, x + j, count, k);
    }
    return r;
  }

  // The row's results from its combined segments.
  template <class T>
  void finish(const T* x, int64_t row, int64_t y, const Stats& r) const {
    const double units = buffered ? 1.0 : factor(p);  // powers of two / k: units of x, or of z
    const double lse = (r.sum.c + std::log2(r.sum.l)) / k * units;
    const double logp = transform_one(load_one(x + y), p.transform) - lse;
    p.lse[row] = lse;
    p.logps[row] = (float)logp;
    const double m = r.sum.c / k, nan = std::isnan(logp) ? NAN : 0.0;
    if (p.entropy) p.entropy[row] = (float)(lse - m - r.weighted / r.sum.l + nan);
    if (p.mean_logits) p.mean_logits[row] = (float)(r.total / (double)p.V + nan);
    if (p.is_top1) p.is_top1[row] = (float)((r.beaten ? 0.0 : 1.0) + nan);
    if (p.log_sum_sq_probs)
      p.log_sum_sq_probs[row] = (float)(std::log(r.squares) - 2 * std::log(r.sum.l) + nan);
  }

  void blank(int64_t row, float value) const {
    p.logps[row] = value;
    p.lse[row] = value;
    for (float* s : {p.entropy, p.mean_logits, p.is_top1, p.log_sum_sq_probs})
      if (s) s[row] = value;
  }

  template <class T>
  void run() const {
    std::vector<int64_t> scored;
    for (int64_t row = 0; row < p.R * p.T; ++row) {
      const int64_t y = p.targets[row];
      if (y == p.ignore_index)
        blank(row, 0.0f);
      else if (y < 0 || y >= p.V)
        blank(row, NAN);
      else
        scored.push_back(row);
    }
    const T* logits = static_cast<const T*>(p.logits);
    auto row_of = [&](int64_t row) {
      return logits + (row / p.T) * p.stride_r + (row % p.T) * p.stride_t;
    };
    const int64_t rows = (int64_t)scored.size();
    const int64_t segments = (p.V + SEGMENT - 1) / SEGMENT;
    if (rows >= 4 * (int64_t)omp_get_max_threads() || segments == 1) {
#pragma omp parallel for schedule(dynamic, 1)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t y = p.targets[scored[i]];
        const T* x = row_of(scored[i]);
        Stats r;
        for (int64_t s = 0; s < segments; ++s)
          r = combine(r, segment(x, s * SEGMENT, std::min(SEGMENT, p.V - s * SEGMENT), y), k);
        finish(x, scored[i], y, r);
      }
      return;
    }
    std::vector<Stats> parts(rows * segments);  // few rows: threads share each
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t part = 0; part < rows * segments; ++part) {
      const int64_t i = part / segments, first = (part % segments) * SEGMENT;
      const int64_t row = scored[i];
      parts[part] = segment(row_of(row), first, std::min(SEGMENT, p.V - first), p.targets[row]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      Stats r;
      for (int64_t s = 0; s < segments; ++s) r = combine(r, parts[i * segments + s], k);
      finish(row_of(scored[i]), scored[i], p.targets[scored[i]], r);
    }
  }
};

// out = g p over n columns of x, g folding the sign, the slope and the rounding of the log-sum-exp.
template <bool Stream, class T>
void scaled_softmax(const T* x, T* out, int64_t n, float k, float c, float g) {
  const F vk = splat(k), vc = splat(c), vg = splat(g);
  int64_t j = 0;
  if constexpr (Stream) {
    constexpr int64_t line = 64;
    while (j < n && ((uintptr_t)(out + j) % line)) {
      store_one(out + j, exp2(splat(load_one(x + j)) * k - c)[0] * g);
      ++j;
    }
    alignas(64) T buffer[line / sizeof(T)];
    constexpr int64_t step = line / sizeof(T);
    for (; j + step <= n; j += step) {
      for (int64_t i = 0; i < step; i += W)
        store(buffer + i, exp2(load(x + j + i) * vk - vc) * vg);
#if defined(__x86_64__)
      const __m128i* from = (const __m128i*)buffer;
      __m128i* to = (__m128i*)(out + j);
      for (int i = 0; i < 4; ++i) _mm_stream_si128(to + i, _mm_load_si128(from + i));
#else
      std::memcpy((void*)(out + j), buffer, line);
#endif
    }
  }
  for (; j + 2 * W <= n; j += 2 * W) {
    F a = exp2(load(x + j) * vk - vc) * vg, b = exp2(load(x + j + W) * vk - vc) * vg;
    store(out + j, a);
    store(out + j + W, b);
  }
  for (; j + W <= n; j += W) store(out + j, exp2(load(x + j) * vk - vc) * vg);
  if (j < n) store_tail(out + j, exp2(load_tail(x + j, n - j, 0.0f) * vk - vc) * vg, n - j);
}

template <class T>
void backward_row(const TokenLogpsBackward& p, const T* x, T* out, int64_t row, bool stream) {
  const int64_t y = p.targets[row];
  const double g = p.grad[row], lse = p.lse[row];
  const double xy = load_one(x + y);  // before it is overwritten
  const double logp = transform_one(xy, p.transform) - lse;
  const double chain = p.transform.scale * p.transform.inv_temperature;
  if (!p.transform.softcap) {
    // c is lse in powers of two as fp32 rounds it; what the rounding lost is a factor of g.
    const float k = (float)(LOG2E * chain);
    const double exact = chain ? lse / chain * (double)k : lse * LOG2E;
    const float c = (float)exact;
    const float factor = (float)(-g * chain * std::exp2((double)c - exact));
    if (stream)
      scaled_softmax<true>(x, out, p.V, k, c, factor);
    else
      scaled_softmax<false>(x, out, p.V, k, c, factor);
  } else {
    const float k = (float)LOG2E, c = (float)(lse * k);
    const float factor = (float)(-g * std::exp2((double)c - lse * k));
    float z[BLOCK + W], slope[BLOCK + W];
    for (int64_t j = 0; j < p.V; j += BLOCK) {
      const int64_t n = std::min(BLOCK, p.V - j);
      transform_block(x + j, n, p.transform, z, slope);
      for (int64_t i = 0; i < n; i += W) {
        F d = exp2(load(z + i) * k - c) * factor * load(slope + i);
        if (i + W <= n)
          store(out + j + i, d);
        else
          store_tail(out + j + i, d, n - i);
      }
    }
  }
  // 1 - p at the target without cancellation, in one rounding: confident tokens are DPO's regime.
  store_one(out + y, (float)(-g * std::expm1(logp) * slope_one(xy, p.transform)));
}

template <class T>
void fill(T* out, int64_t n, float value) {
  if (value == 0) {
    std::memset((void*)out, 0, n * sizeof(T));
    return;
  }
  for (int64_t j = 0; j < n; ++j) store_one(out + j, value);
}

template <class T>
void run_backward(const TokenLogpsBackward& p) {
  const T* logits = static_cast<const T*>(p.logits);
  T* out = static_cast<T*>(p.out);
  const bool stream = p.logits != p.out && p.R * p.T * p.V * (int64_t)sizeof(T) > (8 << 20);
#pragma omp parallel for schedule(dynamic, 4)
  for (int64_t row = 0; row < p.R * p.T; ++row) {
    const int64_t r = row / p.T, t = row % p.T, y = p.targets[row];
    const T* x = logits + r * p.stride_r + t * p.stride_t;
    T* d = out + r * p.out_stride_r + t * p.out_stride_t;
    if (y == p.ignore_index || p.grad[row] == 0)
      fill(d, p.V, 0.0f);
    else if (y < 0 || y >= p.V)
      fill(d, p.V, NAN);
    else
      backward_row(p, x, d, row, stream);
  }
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
}

}  // namespace

void token_logps(const TokenLogps& p) {
  Forward forward(p);
  switch (p.dtype) {
    case DType::f32: return forward.run<float>();
    case DType::bf16: return forward.run<bf16>();
    case DType::f16: return forward.run<f16>();
  }
}

void token_logps_backward(const TokenLogpsBackward& p) {
  switch (p.dtype) {
    case DType::f32: return run_backward<float>(p);
    case DType::bf16: return run_backward<bf16>(p);
    case DType::f16: return run_backward<f16>(p);
  }
}

}  // namespace DPO_ISA
}  // namespace dpo
