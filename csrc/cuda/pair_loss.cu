// sum_k w_k phi_k(z_k) of each pair and its slopes, in fp64: a thread a pair.
#include "../pair_terms.h"
#include "device.h"

namespace dpo {
namespace cuda {
// Named, not anonymous: nvcc would put a hash of this file's path into the kernels' names.
inline namespace pair_loss_kernels {

constexpr int THREADS = 128;

struct Arguments {
  PairLoss p;  // phis and terms below, by value: nothing is copied to the device before the launch
  int32_t phis[MAX_TERMS];
  double terms[MAX_TERMS * TERM_NUMBERS];
};

__global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Arguments a) {
  const PairLoss& p = a.p;
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= p.B) return;
  const double offset = p.offset ? p.offset[i] : 0;
  const PairTerms r = pair_terms(p.u[i], p.v[i], p.beta[i], offset, a.phis, a.terms, p.K);
  store_pair(r, i, p.B, p.loss, p.slopes);
}

}  // namespace pair_loss_kernels

const char* pair_loss(const PairLoss& p, Stream to) {
  if (p.B == 0) return nullptr;
  if (p.K > MAX_TERMS) return "a loss has more terms than the kernel takes";
  Arguments a;
  a.p = p;
  std::memcpy(a.phis, p.phis, sizeof(int32_t) * p.K);
  std::memcpy(a.terms, p.terms, sizeof(double) * TERM_NUMBERS * p.K);
  return on_device(to, [&] {
    return launch(kernel, dim3((unsigned)((p.B + THREADS - 1) / THREADS)), THREADS, 0, to.stream,
                  a);
  });
}

}  // namespace cuda
}  // namespace dpo
