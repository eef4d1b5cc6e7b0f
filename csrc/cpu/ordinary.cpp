// Losses and slopes of pairs, and what is told of them, in double and in order.
#include "functions.h"

#include <algorithm>
#include <vector>

#include "../pair_terms.h"

namespace dpo {
namespace {

template <class T>
void write_fields(const double* found, int64_t B, double divisor, T* loss, T* fields) {
  for (int64_t i = 0; i < (SLOPES - FIELDS) * B; ++i) fields[i] = (T)found[FIELDS * B + i];
  double sum = 0;
  for (int64_t i = 0; i < B; ++i) sum += found[i];
  *loss = (T)(sum / divisor);
}

}  // namespace

void ordinary(const Ordinary& p, const double* sums, const double* counts) {
  for (int64_t i = 0; i < p.B; ++i) {
    const double beta = p.betas ? p.betas[i] : p.beta, offset = p.offset ? p.offset[i] : 0;
    double score[2], tokens[2], reward[2];
    for (int side = 0; side < 2; ++side) {
      const int64_t s = i + side * p.B;
      const double ratio = p.reference ? sums[s] - p.reference[s] : sums[s];
      tokens[side] = p.per_token ? std::max(counts[s], 1.0) : 1;
      score[side] = ratio / tokens[side];
      reward[side] = (p.mean_reward ? score[side] : ratio) * beta;
    }
    const PairTerms r = pair_terms(score[0], score[1], beta, offset, p.phis, p.terms, p.K);
    const double found[FOUND] = {r.loss,
                                 sums[i],
                                 sums[p.B + i],
                                 reward[0],
                                 reward[1],
                                 reward[0] - reward[1],
                                 reward[0] > reward[1] ? 1.0 : 0.0,
                                 r.du / tokens[0],
                                 r.dv / tokens[1]};
    for (int64_t row = 0; row < FOUND; ++row) p.found[row * p.B + i] = found[row];
  }
}

void ordinary_rows(const Ordinary& p, TokenLogps rows, SequenceSum place) {
  std::vector<float> logps(rows.R * rows.T);
  rows.logps = logps.data();
  token_logps(rows);
  std::vector<double> sums(place.S);
  std::vector<int64_t> counts(place.S);
  place.values = rows.logps;
  place.sums = sums.data();
  place.counts = counts.data();
  sequence_sum(place);
  const std::vector<double> tokens(counts.begin(), counts.end());
  ordinary(p, sums.data(), tokens.data());
}

void ordinary_rows_backward(const double* slopes, double scale, TokenLogpsBackward rows,
                            SequenceSum place) {
  std::vector<double> grad(place.S);
  // A loss that does not count gives 0 whatever its slopes.
  for (int64_t s = 0; s < place.S; ++s) grad[s] = scale != 0 ? slopes[s] * scale : 0;
  std::vector<float> d_values(rows.R * rows.T);
  place.grad = grad.data();
  place.d_values = d_values.data();
  sequence_sum_backward(place);
  rows.grad = d_values.data();
  token_logps_backward(rows);
}

void ordinary_fields(const double* found, int64_t B, double divisor, bool wide, void* loss,
                     void* fields) {
  if (wide)
    write_fields(found, B, divisor, static_cast<double*>(loss), static_cast<double*>(fields));
  else
    write_fields(found, B, divisor, static_cast<float*>(loss), static_cast<float*>(fields));
}

void ordinary_streamed(Ordinary p, const TokenLogps& rows, const SequenceSum& place,
                       double divisor, bool wide, void* loss, void* fields) {
  std::vector<double> lse(rows.R * rows.T), found(FOUND * p.B);
  TokenLogps forward = rows;
  forward.lse = lse.data();
  p.found = found.data();
  ordinary_rows(p, forward, place);
  ordinary_fields(p.found, p.B, divisor, wide, loss, fields);
  void* out = const_cast<void*>(rows.logits);
  const TokenLogpsBackward back{nullptr,       rows.logits,  rows.stride_r, rows.stride_t,
                                rows.targets,  lse.data(),   rows.R,        rows.T,
                                rows.V,        rows.ignore_index, rows.dtype, rows.transform,
                                out,           rows.stride_r, rows.stride_t, rows.dtype};
  ordinary_rows_backward(p.found + SLOPES * p.B, 1 / divisor, back, place);
}

}  // namespace dpo
