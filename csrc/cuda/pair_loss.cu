// sum_k w_k phi_k(z_k) of each pair and its slopes, in fp64: a thread a pair. Beside it what an
// ordinary loss makes of the sums of log-probs: its table in one launch, loss and fields in another.
#include "../ordinary.h"
#include "device.h"

namespace dpo {
namespace cuda {
// Named, not anonymous: nvcc would put a hash of this file's path into the kernels' names.
inline namespace pair_loss_kernels {

constexpr int THREADS = 128;

// The terms of a loss, by value: nothing is copied to the device before the launch.
struct Terms {
  int32_t phis[MAX_TERMS];
  double numbers[MAX_TERMS * TERM_NUMBERS];

  static Terms of(const int32_t* phis, const double* numbers, int64_t K) {
    Terms t;
    std::memcpy(t.phis, phis, sizeof(int32_t) * K);
    std::memcpy(t.numbers, numbers, sizeof(double) * TERM_NUMBERS * K);
    return t;
  }
};

DPO_DEVICE int64_t pair_of_thread() { return (int64_t)blockIdx.x * THREADS + threadIdx.x; }

dim3 blocks_of(int64_t B) { return dim3((unsigned)((B + THREADS - 1) / THREADS)); }

struct Arguments {
  PairLoss p;
  Terms terms;
};

__global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Arguments a) {
  const PairLoss& p = a.p;
  const int64_t i = pair_of_thread();
  if (i >= p.B) return;
  const double offset = p.offset ? p.offset[i] : 0;
  const PairTerms r =
      pair_terms(p.u[i], p.v[i], p.beta[i], offset, a.terms.phis, a.terms.numbers, p.K);
  store_pair(r, i, p.B, p.loss, p.slopes);
}

struct OrdinaryArguments {
  Ordinary p;
  Terms terms;
  const double *sums, *counts;
};

__global__ void __launch_bounds__(THREADS)
    ordinary_kernel(const __grid_constant__ OrdinaryArguments a) {
  const int64_t i = pair_of_thread();
  if (i < a.p.B) ordinary_pair(a.p, a.terms.phis, a.terms.numbers, i, a.sums, a.counts);
}

struct FieldArguments {
  const double* found;
  int64_t B;
  double divisor;
  void *loss, *fields;
};

// One block: the losses are summed in an order that the number of pairs alone decides.
template <class T>
__global__ void __launch_bounds__(THREADS) fields_kernel(const __grid_constant__ FieldArguments a) {
  double* sums = (double*)shared_memory();
  const int thread = threadIdx.x, warp = thread / WARP;
  for (int64_t i = thread; i < (SLOPES - FIELDS) * a.B; i += THREADS)
    ((T*)a.fields)[i] = (T)a.found[FIELDS * a.B + i];
  double sum = 0;
  for (int64_t i = thread; i < a.B; i += THREADS) sum += a.found[i];
  sum = warp_sum(sum);
  if (thread % WARP == 0) sums[warp] = sum;
  __syncthreads();
  if (thread) return;
  for (int w = 1; w < THREADS / WARP; ++w) sum += sums[w];
  *(T*)a.loss = (T)(sum / a.divisor);
}

constexpr const char* TOO_MANY = "a loss has more terms than the kernel takes";

}  // namespace pair_loss_kernels

const char* pair_loss(const PairLoss& p, Stream to) {
  if (p.B == 0) return nullptr;
  if (p.K > MAX_TERMS) return TOO_MANY;
  const Arguments a{p, Terms::of(p.phis, p.terms, p.K)};
  return on_device(to, [&] { return launch(kernel, blocks_of(p.B), THREADS, 0, to.stream, a); });
}

const char* ordinary(const Ordinary& p, const double* sums, const double* counts, Stream to) {
  if (p.B == 0) return nullptr;
  if (p.K > MAX_TERMS) return TOO_MANY;
  const OrdinaryArguments a{p, Terms::of(p.phis, p.terms, p.K), sums, counts};
  return on_device(
      to, [&] { return launch(ordinary_kernel, blocks_of(p.B), THREADS, 0, to.stream, a); });
}

const char* ordinary_fields(const double* found, int64_t B, double divisor, bool wide, void* loss,
                            void* fields, Stream to) {
  const FieldArguments a{found, B, divisor, loss, fields};
  const size_t shared = sizeof(double) * (THREADS / WARP);
  return on_device(to, [&] {
    return wide ? launch(fields_kernel<double>, dim3(1), THREADS, shared, to.stream, a)
                : launch(fields_kernel<float>, dim3(1), THREADS, shared, to.stream, a);
  });
}

}  // namespace cuda
}  // namespace dpo
