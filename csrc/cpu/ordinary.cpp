// Losses and slopes of pairs, and what is told of them, in double and in order.
#include <vector>

#include "functions.h"

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
  for (int64_t i = 0; i < p.B; ++i) ordinary_pair(p, p.phis, p.terms, i, sums, counts);
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
