// The scalar functions of the table of losses (dpo_kernels/losses.py) and their derivatives, for
// C++ and CUDA. Each is finite wherever its true value is.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define DPO_HD __host__ __device__
#else
#define DPO_HD
#endif

namespace dpo {

// The numbers of losses.py.
enum Phi { SOFTPLUS, SIGMOID, SQUARE, RELU, EXO, DISCOPOP, IDENTITY };

struct Value {
  double f, d;  // phi(z), phi'(z)
};

DPO_HD inline double softplus(double z) { return fmax(z, 0.0) + log1p(exp(-fabs(z))) + (z - z); }

DPO_HD inline double sigmoid(double z) {
  const double e = exp(-fabs(z));
  return z >= 0 ? 1 / (1 + e) : z < 0 ? e / (1 + e) : z;
}

DPO_HD inline Value phi(int kind, double z, double p) {
  const double inf = INFINITY;
  switch (kind) {
    case SOFTPLUS: {
      if (z == inf || z == -inf) return {z > 0 ? inf : 0.0, z > 0 ? 1.0 : 0.0};
      return {softplus(z), sigmoid(z)};
    }
    case SIGMOID: {
      return {sigmoid(z), sigmoid(z) * sigmoid(-z)};
    }
    case SQUARE: return {z * z, 2 * z};
    case RELU: return {z > 0 ? z : z <= 0 ? 0.0 : z, z > 0 ? 1.0 : 0.0};
    case EXO: {
      const double s = sigmoid(z), r = sigmoid(-z);
      const double log_s = -softplus(-z), log_r = -softplus(z);
      const double logit = log1p(-p) - log(p);
      return {s * (log_s - log1p(-p)) + r * (log_r - log(p)),
              s * r == 0 ? 0.0 : s * r * (z - logit)};
    }
    case DISCOPOP: {
      // m exp(-z) as one exponential: the product overflows (inf * 0) long before its value does.
      const double m_exp = exp(-softplus(-z / p) - z);
      const double m = sigmoid(z / p), r = sigmoid(-z / p), blend = softplus(-z);
      const double d = -r * sigmoid(-z) - m_exp + r / p * (m_exp - m * blend);
      return {r * blend + m_exp, d};
    }
    default: return {z, 1.0};
  }
}

}  // namespace dpo
