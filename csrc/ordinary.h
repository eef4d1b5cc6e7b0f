// What is found of the pairs of an ordinary loss (dpo_kernels/loss/ordinary.py), for C++ and CUDA.
// Letters: B pairs, S = 2B sequences, chosen then rejected, K terms. Null where there is none.
#pragma once

#include "pair_terms.h"

namespace dpo {

// What is found of pairs, [FOUND, B]: losses; log-probs of chosen and rejected, their rewards,
// margins and accuracy; the slopes d losses / d log-probs of both.
constexpr int64_t FIELDS = 1, SLOPES = 7, FOUND = 9;

struct Ordinary {
  const double* reference;  // [S] log-probs, or null
  const double* betas;      // [B], or null: beta
  double beta;
  const double* offset;  // [B] or null
  const int32_t* phis;   // [K]
  const double* terms;   // [K, TERM_NUMBERS]
  int64_t B, K;
  bool per_token;    // whether the terms are of log-ratios per token
  bool mean_reward;  // whether rewards are of those, too
  double* found;     // [FOUND, B]
};

// Pair i, of log-probs [S]; counts [S] of their tokens are read if `per_token`. The terms are given
// apart: a kernel has them by value.
DPO_HD inline void ordinary_pair(const Ordinary& p, const int32_t* phis, const double* terms,
                                 int64_t i, const double* sums, const double* counts) {
  const double beta = p.betas ? p.betas[i] : p.beta, offset = p.offset ? p.offset[i] : 0;
  double score[2], tokens[2], reward[2];
  for (int side = 0; side < 2; ++side) {
    const int64_t s = i + side * p.B;
    const double ratio = p.reference ? sums[s] - p.reference[s] : sums[s];
    tokens[side] = p.per_token && counts[s] > 1 ? counts[s] : 1;
    score[side] = ratio / tokens[side];
    reward[side] = (p.mean_reward ? score[side] : ratio) * beta;
  }
  double* found = p.found + i;
  found[p.B] = sums[i];
  found[2 * p.B] = sums[p.B + i];
  found[3 * p.B] = reward[0];
  found[4 * p.B] = reward[1];
  found[5 * p.B] = reward[0] - reward[1];
  found[6 * p.B] = reward[0] > reward[1] ? 1.0 : 0.0;
  const PairTerms r = pair_terms(score[0], score[1], beta, offset, phis, terms, p.K);
  found[0] = r.loss;
  found[7 * p.B] = r.du / tokens[0];
  found[8 * p.B] = r.dv / tokens[1];
}

}  // namespace dpo
