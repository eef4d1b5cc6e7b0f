// Weighted sums over the scored tokens of each sequence, in fp64 and in a fixed order: a block each.
//
// LD-DPO (arXiv 2409.06411) weighs the scored tokens past the shorter completion of the pair
// (s, s + S / 2): their rank in the sequence is counted as the block walks along it.
#include "sequences.h"

namespace dpo {
namespace cuda {
// Named, not anonymous: nvcc would put a hash of this file's path into the kernels' names.
inline namespace sequence_sum_kernels {

constexpr int THREADS = 256, WARPS = THREADS / WARP;

struct Arguments {
  SequenceSum p;
  int64_t rows, T;
  Scale scale;
};

// Of the sum of sequence s.
DPO_DEVICE double gradient_of(const Arguments& a, int64_t s) {
  const Scale& by = a.scale;
  double k = by.factor;
  if (by.scale) k *= by.scale[by.each ? s % (a.p.S / 2) : 0];
  return k != 0 ? k * a.p.grad[s] : 0;
}

struct Shared {
  int64_t scored[WARPS];
  double sums[WARPS];
};

// The sum over the block of `n`, and over the threads before this one.
DPO_DEVICE int64_t count_block(Shared& shared, bool flag, int64_t& before) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const uint32_t votes = __ballot_sync(FULL, flag);
  __syncthreads();
  if (lane == 0) shared.scored[warp] = __popc(votes);
  __syncthreads();
  int64_t total = 0;
  before = __popc(votes & ((1u << lane) - 1));
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += shared.scored[w];
    total += shared.scored[w];
  }
  return total;
}

DPO_DEVICE int64_t count_sequence(const Arguments& a, Shared& shared, int64_t s) {
  const int64_t first = first_row(a.p.starts, s, a.rows, a.T);
  const int64_t end = first_row(a.p.starts, s + 1, a.rows, a.T);
  int64_t n = 0, before;
  for (int64_t start = first; start < end; start += THREADS) {
    const int64_t i = start + threadIdx.x;
    n += count_block(shared, i < end && a.p.targets[i] != a.p.ignore_index, before);
  }
  return n;
}

template <bool BACKWARD>
__global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Arguments a) {
  Shared& shared = *(Shared*)shared_memory();
  const SequenceSum& p = a.p;
  const int64_t s = blockIdx.x;
  const int64_t first = first_row(p.starts, s, a.rows, a.T);
  const int64_t end = first_row(p.starts, s + 1, a.rows, a.T);
  int64_t head = INT64_MAX;  // scored tokens of weight 1
  if (p.tail_weight != 1) {
    const int64_t own = count_sequence(a, shared, s);
    const int64_t other = count_sequence(a, shared, (s + p.S / 2) % p.S);
    head = own < other ? own : other;
  }
  const double g = BACKWARD ? gradient_of(a, s) : 0;
  double sum = 0;
  int64_t count = 0;
  for (int64_t start = first; start < end; start += THREADS) {
    const int64_t i = start + threadIdx.x;
    const bool scored = i < end && p.targets[i] != p.ignore_index;
    int64_t rank;
    const int64_t more = count_block(shared, scored, rank);
    const double w = !scored ? 0 : count + rank < head ? 1.0 : p.tail_weight;
    if (BACKWARD) {
      const double d = w != 0 ? g * w : 0;  // an overflowing gradient saturates, NaN stays NaN
      if (i < end) p.d_values[i] = (float)(d > FLT_MAX ? FLT_MAX : d < -FLT_MAX ? -FLT_MAX : d);
    } else if (w != 0) {
      sum += w * p.values[i];
    }
    count += more;
  }
  if (BACKWARD) return;
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) shared.sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < WARPS; ++w) total += shared.sums[w];
    p.sums[s] = total;
    p.counts[s] = count;
  }
}

template <bool BACKWARD>
const char* run(const SequenceSum& p, int64_t rows, const Scale& scale, Stream to) {
  if (p.S == 0) return nullptr;
  const Arguments a{p, rows, rows / p.S, scale};
  return on_device(to, [&] {
    return launch(kernel<BACKWARD>, dim3((unsigned)p.S), THREADS, sizeof(Shared), to.stream, a);
  });
}

}  // namespace sequence_sum_kernels

const char* sequence_sum(const SequenceSum& p, int64_t rows, Stream to) {
  return run<false>(p, rows, {}, to);
}

const char* sequence_sum_backward(const SequenceSum& p, int64_t rows, const Scale& scale,
                                  Stream to) {
  return run<true>(p, rows, scale, to);
}

}  // namespace cuda
}  // namespace dpo
