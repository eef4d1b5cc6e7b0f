// sum_k w_k phi_k(z_k) of each pair and its slopes in u, v, beta and the offset, in double.
#include "../pair_terms.h"

namespace dpo {

void pair_loss(const PairLoss& p) {
  for (int64_t i = 0; i < p.B; ++i) {
    const double offset = p.offset ? p.offset[i] : 0;
    const PairTerms r = pair_terms(p.u[i], p.v[i], p.beta[i], offset, p.phis, p.terms, p.K);
    store_pair(r, i, p.B, p.loss, p.slopes);
  }
}

}  // namespace dpo
