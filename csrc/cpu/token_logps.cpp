// Log-prob and log-sum-exp of each scored row, and the gradient of the logits.
//
// Compiled once per instruction set (DPO_ISA names the namespace). A row is cut into segments of
// fixed length; each gives (m, sum of 2^((x - m) k)) with its own maximum m, and the segments are
// combined in order in double. So a row's result does not depend on how many threads share it, nor
// on what else is in the batch. k = log2(e) dz/dx folds scale and temperature into one product, and
// subtracting m from the logit itself loses nothing where it counts (x near m), whatever common
// offset the logits have. Only softcap needs z itself, a block at a time, in fp32.
#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

namespace dpo {
namespace DPO_ISA {
namespace {

// One set of a row's statistics over some columns, combined like Sum.
struct Stats {
  Sum sum;
  double weighted = 0;  // of 2^((x - m) k) (x - m)
  double squares = 0;  // of 4^((x - m) k)
  double total = 0;  // of x
  bool beaten = false;  // a column comes before the target in the order of argmax
};

Stats combine(const Stats& a, const Stats& b, double k) {
  Stats r;
  r.sum = combine(a.sum, b.sum, k);
  for (const Stats* s : {&a, &b}) {
    if (s->sum.l == 0) continue;
    const double shift = s->sum.m - r.sum.m, f = std::exp2(shift * k);
    r.weighted += f * (s->weighted + s->sum.l * shift);
    r.squares += f * f * s->squares;
  }
  r.total = a.total + b.total;
  r.beaten = a.beaten || b.beaten;
  return r;
}

// The statistics of one block of fp32 values starting at column `first`.
Stats block_stats(const float* x, int64_t n, int64_t first, int64_t y, float xy, float k) {
  Stats r;
  add_block(r.sum, x, n, k);
  double total = 0;
  bool beaten = false;
  const float sign = k < 0 ? -1.0f : 1.0f;
  for (int64_t j = 0; j < n; ++j) {
    total += x[j];
    beaten |= sign * x[j] > sign * xy || ((x[j] == xy || k == 0) && first + j < y);
  }
  r.total = total;
  r.beaten = beaten;
  if (r.sum.l == 0) return r;
  const float m = (float)r.sum.m;
  F weighted = splat(0.0f), squares = splat(0.0f);
  for (int64_t j = 0; j < n; j += W) {
    F v = j + W <= n ? load(x + j) : load_tail(x + j, n - j, m);
    F d = v - m, e = exp2(d * k);
    d = max(splat(-1e4f), min(splat(1e4f), d));  // -inf times an (underflown) weight is 0
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
  const bool stats;
  const bool buffered;  // blocks are widened to fp32 first
  const double unit;  // z per unit of what is summed
  const float k;  // powers of two per unit

  explicit Forward(const TokenLogps& params)
      : p(params),
        stats(p.entropy || p.mean_logits || p.is_top1 || p.log_sum_sq_probs),
        buffered(stats || p.transform.softcap != 0),
        unit(factor(p.transform)),
        k((float)(LOG2E * unit)) {}

  template <class T>
  Stats segment(const T* x, int64_t first, int64_t n, int64_t y) const {
    Stats r;
    float z[BLOCK + W];
    const float zy = (float)value_of(x + y, p.transform);
    for (int64_t j = first; j < first + n; j += BLOCK) {
      const int64_t count = std::min(BLOCK, first + n - j);
      if (buffered) widen(x + j, count, p.transform, z, nullptr);
      if (stats)
        r = combine(r, block_stats(z, count, j, y, zy, k), k);
      else if (buffered)
        add_block(r.sum, z, count, k);
      else
        add_block(r.sum, x + j, count, k);
    }
    return r;
  }

  // The row's results from its combined segments. k is `unit` as fp32 rounds it, in the sum and
  // here alike; differences are taken before they are scaled.
  template <class T>
  void finish(const T* x, int64_t row, int64_t y, const Stats& r) const {
    const double log_l = std::log2(r.sum.l) * LN2;
    const double logp = (value_of(x + y, p.transform) - r.sum.m) * unit - log_l;
    const double nan = std::isnan(logp) ? NAN : 0.0;
    p.lse[row] = r.sum.m * unit + log_l;
    p.logps[row] = (float)logp;
    if (p.entropy) p.entropy[row] = (float)(log_l - r.weighted * unit / r.sum.l + nan);
    if (p.mean_logits) p.mean_logits[row] = (float)(r.total * unit / (double)p.V + nan);
    if (p.is_top1) p.is_top1[row] = (float)((r.beaten ? 0.0 : 1.0) + nan);
    if (p.log_sum_sq_probs)
      p.log_sum_sq_probs[row] = (float)(std::log(r.squares) - 2 * log_l + nan);
  }

  void blank(int64_t row, float value) const {
    p.logps[row] = value;
    p.lse[row] = value;
    for (float* s : {p.entropy, p.mean_logits, p.is_top1, p.log_sum_sq_probs})
      if (s) s[row] = value;
  }

  template <class T>
  void run() const {
    const T* logits = static_cast<const T*>(p.logits);
    auto row_of = [&](int64_t row) {
      return logits + (row / p.T) * p.stride_r + (row % p.T) * p.stride_t;
    };
    const std::vector<int64_t> scored =
        scored_rows(p.targets, p.R * p.T, p.V, p.ignore_index,
                    [&](int64_t row, float value) { blank(row, value); });
    reduce_rows<Stats>(
        scored, p.V, k,
        [&](int64_t row, int64_t first, int64_t n) {
          return segment(row_of(row), first, n, p.targets[row]);
        },
        [&](int64_t row, const Stats& r) { finish(row_of(row), row, p.targets[row], r); });
  }
};

// out = g p over n columns of x, p = 2^((x - m) k); g folds the sign, the slope and what rounding took from the log-sum-exp m.
template <bool Stream, class T, class O>
void scaled_softmax(const T* x, O* out, int64_t n, float k, float m, float g) {
  const F vk = splat(k), vm = splat(m), vg = splat(g);
  int64_t j = 0;
  if constexpr (Stream) {
    constexpr int64_t line = 64;
    while (j < n && ((uintptr_t)(out + j) % line)) {
      store_one(out + j, exp2((splat(load_one(x + j)) - m) * k)[0] * g);
      ++j;
    }
    alignas(64) O buffer[line / sizeof(O)];
    constexpr int64_t step = line / sizeof(O);
    for (; j + step <= n; j += step) {
      for (int64_t i = 0; i < step; i += W)
        store(buffer + i, exp2((load(x + j + i) - vm) * vk) * vg);
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
    F a = exp2((load(x + j) - vm) * vk) * vg, b = exp2((load(x + j + W) - vm) * vk) * vg;
    store(out + j, a);
    store(out + j + W, b);
  }
  for (; j + W <= n; j += W) store(out + j, exp2((load(x + j) - vm) * vk) * vg);
  if (j < n) store_tail(out + j, exp2((load_tail(x + j, n - j, 0.0f) - vm) * vk) * vg, n - j);
}

template <class T, class O>
void backward_row(const TokenLogpsBackward& p, const T* x, O* out, int64_t row, bool stream) {
  const int64_t y = p.targets[row];
  const double g = p.grad[row], unit = factor(p.transform);
  const double xy = load_one(x + y);  // before it is overwritten
  const double logp = value_of(x + y, p.transform) * unit - p.lse[row];
  const float k = (float)(LOG2E * unit);
  const double exact = unit ? p.lse[row] / unit : 0.0;  // in units of what is summed
  const float m = (float)exact;
  // With k = 0 (logit_scale=0) the softmax is flat, exp(-lse), and the chain below is 0 anyway.
  const double rounding = std::exp2(((double)m - exact) * k);
  const double chain = p.transform.softcap ? 1.0 : unit;
  const float factor = (float)(-g * chain * rounding);
  if (!p.transform.softcap) {
    if (stream)
      scaled_softmax<true>(x, out, p.V, k, m, factor);
    else
      scaled_softmax<false>(x, out, p.V, k, m, factor);
  } else {
    float z[BLOCK + W], slope[BLOCK + W];
    for (int64_t j = 0; j < p.V; j += BLOCK) {
      const int64_t n = std::min(BLOCK, p.V - j);
      widen(x + j, n, p.transform, z, slope);
      for (int64_t i = 0; i < n; i += W) {
        F d = exp2((load(z + i) - m) * k) * factor * load(slope + i);
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

template <class T, class O>
void run_backward(const TokenLogpsBackward& p) {
  const T* logits = static_cast<const T*>(p.logits);
  O* out = static_cast<O*>(p.out);
  const int64_t bytes = p.R * p.T * p.V * (int64_t)sizeof(O);
  const bool stream = p.logits != p.out && bytes > (8 << 20);
  if (stream) advise_huge_pages(p.out, bytes);  // `out` is then rows of one buffer
#pragma omp parallel for schedule(dynamic, 4)
  for (int64_t row = 0; row < p.R * p.T; ++row) {
    const int64_t r = row / p.T, t = row % p.T, y = p.targets[row];
    const T* x = logits + r * p.stride_r + t * p.stride_t;
    O* d = out + r * p.out_stride_r + t * p.out_stride_t;
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
    case DType::f32:  // whose gradient may be rounded as it is written
      return p.out_dtype == DType::bf16 ? run_backward<float, bf16>(p)
                                        : run_backward<float, float>(p);
    case DType::bf16: return run_backward<bf16, bf16>(p);
    case DType::f16: return run_backward<f16, f16>(p);
  }
}

}  // namespace DPO_ISA
}  // namespace dpo
