// sum_k w_k phi_k(z_k) of each pair and its slopes in u, v, beta and the offset, in double.
#include "../params.h"
#include "../phi.h"

namespace dpo {

void pair_loss(const PairLoss& p) {
  for (int64_t i = 0; i < p.B; ++i) {
    const double u = p.u[i], v = p.v[i], beta = p.beta[i], offset = p.offset ? p.offset[i] : 0;
    double loss = 0, du = 0, dv = 0, d_beta = 0, d_offset = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      const double* t = p.terms + 10 * k;
      const double w0 = t[0], a = t[1], b = t[2], c = t[3], c_beta = t[4], c_inv = t[5], c_off = t[6];
      const bool scaled = t[8] != 0, w_beta = t[9] != 0;
      // A score that a term does not use must not reach it: 0 * inf is NaN.
      const double linear = (a != 0 ? a * u : 0) + (b != 0 ? b * v : 0);
      const double s = scaled ? beta : 1, w = w_beta ? w0 * beta : w0;
      const double off_scale = c_off != 0 ? c_off / (scaled ? 1 : beta) : 0;
      const double z = s * linear + c + c_beta * beta + (c_inv != 0 ? c_inv / beta : 0) +
                       off_scale * offset;
      const Value f = phi(p.phis[k], z, t[7]);
      const double slope = w * f.d;
      loss += w * f.f;
      if (a != 0) du += slope * s * a;
      if (b != 0) dv += slope * s * b;
      d_beta += slope * ((scaled ? linear : 0) + c_beta - c_inv / (beta * beta));
      if (!scaled) d_beta -= slope * off_scale * offset / beta;
      if (w_beta) d_beta += w0 * f.f;
      d_offset += slope * off_scale;
    }
    p.loss[i] = loss;
    p.slopes[i] = du;
    p.slopes[p.B + i] = dv;
    p.slopes[2 * p.B + i] = d_beta;
    p.slopes[3 * p.B + i] = d_offset;
  }
}

}  // namespace dpo
