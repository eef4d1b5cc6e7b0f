// Weighted sums over the scored tokens of each sequence, in double and in order.
#include <algorithm>
#include <cfloat>

#include "functions.h"

namespace dpo {
namespace {

int64_t count(const SequenceSum& p, int64_t s) {
  int64_t n = 0;
  for (int64_t i = p.starts[s]; i < p.starts[s + 1]; ++i) n += p.targets[i] != p.ignore_index;
  return n;
}

// Calls f(flat position, weight) for each scored token: LD-DPO's tail is what lies past the shorter
// completion of the pair (s, s + S / 2).
template <class Visit>
void visit(const SequenceSum& p, int64_t s, Visit f) {
  int64_t head = INT64_MAX;
  if (p.tail_weight != 1) head = std::min(count(p, s), count(p, (s + p.S / 2) % p.S));
  int64_t rank = 0;
  for (int64_t i = p.starts[s]; i < p.starts[s + 1]; ++i)
    if (p.targets[i] != p.ignore_index) f(i, rank++ < head ? 1.0 : p.tail_weight);
}

}  // namespace

void sequence_sum(const SequenceSum& p) {
  for (int64_t s = 0; s < p.S; ++s) {
    double sum = 0;
    int64_t n = 0;
    visit(p, s, [&](int64_t i, double w) {
      if (w != 0) sum += w * p.values[i];
      ++n;
    });
    p.sums[s] = sum;
    p.counts[s] = n;
  }
}

void sequence_sum_backward(const SequenceSum& p) {
  for (int64_t s = 0; s < p.S; ++s) {
    const double g = p.grad[s];
    visit(p, s, [&](int64_t i, double w) {
      const double d = w != 0 ? g * w : 0.0;  // an overflowing gradient saturates, NaN stays NaN
      p.d_values[i] = (float)(d > FLT_MAX ? FLT_MAX : d < -FLT_MAX ? -FLT_MAX : d);
    });
  }
}

}  // namespace dpo
