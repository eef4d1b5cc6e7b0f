// Log-probs of policy and reference and KL(reference || policy) of each scored row, in one pass over
// both, and the gradient of the policy's logits.
//
// With q, p the softmax of the reference's and the policy's z, as sums over the columns v
//
//     KL = unit sum_v q_v (r_v - x_v) + lse(policy) - lse(reference)
//
// of what token_logps.cpp sums (x, r: values with z = unit * value). Rows are cut and combined as
// there. Within a block the difference is taken between distances from the blocks' maxima, in fp32;
// what the maxima themselves contribute is added in double, so no offset of the logits costs digits.
#include <cmath>
#include <vector>

#include "rows.h"

namespace dpo {
namespace DPO_ISA {
namespace {

struct Gap {  // over some columns
  Sum policy, reference;
  double gap = 0;  // of 2^((r - m) k) (r - x), m that of `reference`
};

Gap combine(const Gap& a, const Gap& b, double k) {
  Gap r;
  r.policy = combine(a.policy, b.policy, k);
  r.reference = combine(a.reference, b.reference, k);
  for (const Gap* s : {&a, &b}) {
    if (s->reference.l == 0) continue;
    // An infinite gap stays one: times a weight that underflows it would be NaN.
    const double f = std::exp2((s->reference.m - r.reference.m) * k);
    r.gap += std::isinf(s->gap) ? s->gap : f * s->gap;
  }
  return r;
}

Gap block_gap(const float* x, const float* r, int64_t n, float k) {
  Gap out;
  const float mx = k >= 0 ? block_max(x, n) : block_min(x, n);
  const float mr = k >= 0 ? block_max(r, n) : block_min(r, n);
  if (mx * k == -INF || mr * k == -INF) {
    add_block(out.policy, x, n, k);
    add_block(out.reference, r, n, k);
    // Something where the policy has nothing at all: infinite. Nothing in the reference: 0.
    if (mr * k != -INF) out.gap = k < 0 ? -INF : INF;
    return out;
  }
  F sx = splat(0.0f), sr = sx, sg = sx;
  for (int64_t j = 0; j < n; j += W) {
    const bool whole = j + W <= n;
    const F dx = (whole ? load(x + j) : load_tail(x + j, n - j, mx)) - mx;
    const F dr = (whole ? load(r + j) : load_tail(r + j, n - j, mr)) - mr;
    const F t = dr * k;
    F ex = exp2(dx * k), er = exp2(t);
    if (!whole)
      for (int i = (int)(n - j); i < W; ++i) ex[i] = er[i] = 0.0f;
    sx += ex;
    sr += er;
    sg += t == splat(-INF) ? splat(0.0f) : er * (dr - dx);  // 0 log(0 / p) = 0, for p = 0 too
  }
  out.policy = {(double)mx, horizontal_sum(sx)};
  out.reference = {(double)mr, horizontal_sum(sr)};
  out.gap = horizontal_sum(sg) + ((double)mr - mx) * out.reference.l;
  return out;
}

// A tensor of logits of either operand, read a block at a time as fp32.
struct Rows {
  const void* logits;
  int64_t stride_r, stride_t, T;
  DType dtype;
  const Transform& transform;

  void read(int64_t row, int64_t first, int64_t n, float* z, float* slope = nullptr) const {
    const int64_t at = (row / T) * stride_r + (row % T) * stride_t + first;
    switch (dtype) {
      case DType::f32: return widen((const float*)logits + at, n, transform, z, slope);
      case DType::bf16: return widen((const bf16*)logits + at, n, transform, z, slope);
      case DType::f16: return widen((const f16*)logits + at, n, transform, z, slope);
    }
  }

  // The value of one column as the sums see it, and its dz/dx.
  double value(int64_t row, int64_t y, double* slope = nullptr) const {
    float z[W], s[W];
    read(row, y, 1, z, s);
    if (slope) *slope = transform.softcap ? (double)s[0] : factor(transform);
    return z[0];
  }
};

// softmax of a row as 2^((value - m) k) * rounding, from its log-sum-exp.
struct Softmax {
  float m, rounding;

  Softmax(double lse, double unit, float k) {
    const double exact = unit ? lse / unit : 0.0;
    m = (float)exact;
    rounding = (float)std::exp2(((double)m - exact) * k);
  }
  F operator()(F value, float k) const { return exp2((value - m) * k) * rounding; }
};

struct Backward {
  const TokenKlBackward& p;
  const Rows policy, reference;
  const double unit;
  const float k;

  explicit Backward(const TokenKlBackward& b)
      : p(b),
        policy{b.logits, b.stride_r, b.stride_t, b.T, b.dtype, b.transform},
        reference{b.ref_logits, b.ref_stride_r, b.ref_stride_t, b.T, b.ref_dtype, b.transform},
        unit(factor(b.transform)),
        k((float)(LOG2E * unit)) {}

  // g_kl (p - q) - g_logp p, times dz/dx; 1 - p at the target without cancellation.
  template <class T>
  void row(int64_t row, T* out) const {
    const int64_t y = p.targets[row];
    const double g_logp = p.grad_logps[row], g_kl = p.grad_kl[row];
    double slope_y;
    const double at_policy = policy.value(row, y, &slope_y) * unit - p.lse[row];
    double d_y = -g_logp * std::expm1(at_policy);
    // A row whose KL is not wanted leaves the reference unread.
    const double ref_lse = g_kl ? p.ref_lse[row] : 0.0;
    if (g_kl) {
      const double at_reference = reference.value(row, y) * unit - ref_lse;
      d_y += g_kl * (std::expm1(at_policy) - std::expm1(at_reference));
    }
    const Softmax sx(p.lse[row], unit, k), sr(ref_lse, unit, k);
    const float gl = (float)g_logp, gk = (float)g_kl;
    const float chain = (float)(p.transform.softcap ? 1.0 : unit);
    float x[BLOCK + W], r[BLOCK + W], slope[BLOCK + W];
    float* const s = p.transform.softcap ? slope : nullptr;
    for (int64_t j = 0; j < p.V; j += BLOCK) {
      const int64_t n = std::min(BLOCK, p.V - j);
      policy.read(row, j, n, x, s);
      if (g_kl) reference.read(row, j, n, r);
      for (int64_t i = 0; i < n; i += W) {
        const F px = sx(load(x + i), k);
        F d = -gl * px;
        if (g_kl) d += gk * (px - sr(load(r + i), k));
        d *= s ? load(s + i) : splat(chain);
        if (i + W <= n)
          store(out + j + i, d);
        else
          store_tail(out + j + i, d, n - i);
      }
    }
    store_one(out + y, (float)(d_y * slope_y));
  }

  template <class T>
  void run() const {
    T* out = static_cast<T*>(p.out);
#pragma omp parallel for schedule(dynamic, 4)
    for (int64_t i = 0; i < p.R * p.T; ++i) {
      const int64_t y = p.targets[i];
      T* d = out + (i / p.T) * p.out_stride_r + (i % p.T) * p.out_stride_t;
      if (y == p.ignore_index || (p.grad_logps[i] == 0 && p.grad_kl[i] == 0))
        fill(d, p.V, 0.0f);
      else if (y < 0 || y >= p.V)
        fill(d, p.V, NAN);
      else
        row(i, d);
    }
  }
};

}  // namespace

void token_kl(const TokenKl& p) {
  const Rows policy{p.logits, p.stride_r, p.stride_t, p.T, p.dtype, p.transform};
  const Rows reference{p.ref_logits, p.ref_stride_r, p.ref_stride_t, p.T, p.ref_dtype, p.transform};
  const double unit = factor(p.transform);
  const float k = (float)(LOG2E * unit);
  auto segment = [&](int64_t row, int64_t first, int64_t n) {
    Gap r;
    float x[BLOCK + W], z[BLOCK + W];
    for (int64_t j = first; j < first + n; j += BLOCK) {
      const int64_t count = std::min(BLOCK, first + n - j);
      policy.read(row, j, count, x);
      reference.read(row, j, count, z);
      r = combine(r, block_gap(x, z, count, k), k);
    }
    return r;
  };
  auto finish = [&](int64_t row, const Gap& r) {
    const int64_t y = p.targets[row];
    const double log_x = std::log2(r.policy.l) * LN2, log_r = std::log2(r.reference.l) * LN2;
    p.lse[row] = r.policy.m * unit + log_x;
    p.ref_lse[row] = r.reference.m * unit + log_r;
    p.logps[row] = (float)((policy.value(row, y) - r.policy.m) * unit - log_x);
    p.ref_logps[row] = (float)((reference.value(row, y) - r.reference.m) * unit - log_r);
    p.kl[row] = (float)(r.gap / r.reference.l * unit + p.lse[row] - p.ref_lse[row]);
  };
  auto blank = [&](int64_t row, float value) {
    p.logps[row] = p.ref_logps[row] = p.kl[row] = value;
    p.lse[row] = p.ref_lse[row] = value;
  };
  reduce_rows<Gap>(scored_rows(p.targets, p.R * p.T, p.V, p.ignore_index, blank), p.V, k, segment,
                   finish);
}

void token_kl_backward(const TokenKlBackward& p) {
  const Backward backward(p);
  switch (p.dtype) {
    case DType::f32: return backward.run<float>();
    case DType::bf16: return backward.run<bf16>();
    case DType::f16: return backward.run<f16>();
  }
}

}  // namespace DPO_ISA
}  // namespace dpo
