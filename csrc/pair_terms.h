// One pair's loss, sum_k w_k phi_k(z_k), and its slopes, for C++ and CUDA.
#pragma once

#include "params.h"
#include "phi.h"

namespace dpo {

struct PairTerms {
  double loss = 0, du = 0, dv = 0, d_beta = 0, d_offset = 0;
};

DPO_HD inline PairTerms pair_terms(double u, double v, double beta, double offset,
                                   const int32_t* phis, const double* terms, int64_t K) {
  PairTerms r;
  for (int64_t k = 0; k < K; ++k) {
    const double* t = terms + TERM_NUMBERS * k;
    const double w0 = t[0], a = t[1], b = t[2], c = t[3], c_beta = t[4], c_inv = t[5], c_off = t[6];
    const bool scaled = t[8] != 0, w_beta = t[9] != 0;
    // A score that a term does not use must not reach it: 0 * inf is NaN.
    const double linear = (a != 0 ? a * u : 0) + (b != 0 ? b * v : 0);
    const double s = scaled ? beta : 1, w = w_beta ? w0 * beta : w0;
    const double off_scale = c_off != 0 ? c_off / (scaled ? 1 : beta) : 0;
    const double z =
        s * linear + c + c_beta * beta + (c_inv != 0 ? c_inv / beta : 0) + off_scale * offset;
    const Value f = phi(phis[k], z, t[7]);
    const double slope = w * f.d;
    r.loss += w * f.f;
    if (a != 0) r.du += slope * s * a;
    if (b != 0) r.dv += slope * s * b;
    r.d_beta += slope * ((scaled ? linear : 0) + c_beta - c_inv / (beta * beta));
    if (!scaled) r.d_beta -= slope * off_scale * offset / beta;
    if (w_beta) r.d_beta += w0 * f.f;
    r.d_offset += slope * off_scale;
  }
  return r;
}

// Writes pair i's loss and slopes [4, B].
DPO_HD inline void store_pair(const PairTerms& r, int64_t i, int64_t B, double* loss,
                              double* slopes) {
  loss[i] = r.loss;
  slopes[i] = r.du;
  slopes[B + i] = r.dv;
  slopes[2 * B + i] = r.d_beta;
  slopes[3 * B + i] = r.d_offset;
}

}  // namespace dpo
