// Log-prob, log-sum-exp and statistics of each scored row in one read.
//
// A persistent grid takes items, (row, part of the row), in order from a ticket: a block that meets
// unscored rows takes more of them. One warp of each block, the scout, looks ahead for the next
// scored item and finishes the last one, so that skipping rows, where a row lies and what is made of
// its sums cost the others nothing. Each thread of the others keeps STAGES groups of 16-byte copies
// in flight into shared memory that it alone reads (no barrier), across the ends of rows too, so that
// memory stays busy while a row is reduced. A thread carries its maximum in fp32 and its sum in fp64
// and rescales only when a group of elements raises its maximum; threads meet once an item. No result
// depends on which block took which item: reductions are in fixed order, and parts of a row are
// combined in order by the block that finishes last.
#include <type_traits>

#include "row_sums.h"

namespace dpo {
namespace cuda {
// Named, not anonymous: nvcc would put a hash of this file's path into the kernels' names.
inline namespace token_logps_kernels {

// Threads that read, 16-byte vectors a stage, stages, blocks an SM. With the scout's warp the warps
// are a multiple of four, so that each scheduler has as many.
#ifndef DPO_FORWARD_CONFIG
#define DPO_FORWARD_CONFIG 352, 4, 2, 2
#endif
#ifndef DPO_FORWARD_RICH_CONFIG  // with statistics, which need registers
#define DPO_FORWARD_RICH_CONFIG 352, 2, 4, 2
#endif

template <int THREADS_, int VECTORS_, int STAGES_, int BLOCKS_>
struct Config {
  static constexpr int THREADS = THREADS_, VECTORS = VECTORS_, STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr int WARPS = THREADS / WARP;
};
using Forward = Config<DPO_FORWARD_CONFIG>;
using RichForward = Config<DPO_FORWARD_RICH_CONFIG>;

// Zero before and after every launch.
struct Counters {
  uint32_t ticket;
  uint32_t finished;  // blocks
  // then uint32_t [rows] parts done
};

struct Item {
  int row;  // -1: no more
  int part;
  int y;  // the target, and its scaled logit
  float zy;
  const void* x;  // the row
  int head, tail;  // elements outside the whole vectors
  int first, end;  // the part's vectors, counted in the row
};

template <class C>
struct Shared {
  Vec ring[C::STAGES][C::VECTORS][C::THREADS];
  Partial warps[2][C::WARPS];  // by parity of the item: one barrier an item is then enough
  Item items[3];  // the one at work, the next (being copied) and the one looked for
};

// Of 100 KB a multiprocessor of sm_86, 89 and 120; a block costs 1 KB besides its own.
template <class C>
constexpr bool FITS = C::BLOCKS * (sizeof(Shared<C>) + 1024) <= 100 * 1024;
static_assert(FITS<Forward> && FITS<RichForward>,
              "the blocks of the forward do not fit beside each other");

struct Arguments {
  TokenLogps p;
  Scaling scaling;
  int rows, V, splits;
  Counters* counters;
  uint32_t* parts_done;  // [rows]
  Partial* partials;  // [rows, splits]
};

// The first of n vectors that belongs to a part.
DPO_DEVICE int part_of(int n, int part, int parts) {
  return parts == 1 ? n * part : (int)((int64_t)n * part / parts);
}

// A warp's: the next scored item; rows that are not scored are written on the way.
template <class T, bool SOFTCAP>
DPO_DEVICE bool find_item(const Arguments& a, Item* slot, bool more) {
  const int lane = threadIdx.x % WARP;
  Item item{};
  item.row = -1;
  while (more) {
    unsigned ticket = 0;
    if (lane == 0) ticket = add_relaxed(&a.counters->ticket, 1);
    ticket = __shfl_sync(FULL, ticket, 0);
    if (ticket >= (unsigned)a.rows * a.splits) break;
    const int row = (int)(ticket / a.splits);
    const int64_t y = a.p.targets[row];
    item.part = (int)(ticket % a.splits);
    if (y != a.p.ignore_index && y >= 0 && y < a.p.V) {
      const T* x = row_at((const T*)a.p.logits, a.p.stride_r, a.p.stride_t, a.p.T, row);
      const Span span = span_of(x, a.V);
      item.row = row;
      item.y = (int)y;
      item.zy = scaled<SOFTCAP>(a.scaling, turned(a.scaling, x[y]));
      item.x = x;
      item.head = span.head;
      item.tail = span.tail;
      item.first = part_of(span.vectors, item.part, a.splits);
      item.end = part_of(span.vectors, item.part + 1, a.splits);
      break;
    }
    if (item.part) continue;
    if (lane == 0) {
      const float value = y == a.p.ignore_index ? 0.0f : NAN;
      a.p.logps[row] = value;
      a.p.lse[row] = value;
      for (float* stat : {a.p.entropy, a.p.mean_logits, a.p.is_top1, a.p.log_sum_sq_probs})
        if (stat) stat[row] = value;
    }
  }
  if (lane == 0) *slot = item;
  return item.row >= 0;
}

// One lane's: the row's results from all of its sums.
template <bool STATS>
DPO_DEVICE void store_row(const Arguments& a, int row, int y, float zy, const Sums<STATS>& s) {
  const TokenLogps& p = a.p;
  const double unit = a.scaling.unit, l = s.l == 0 ? (double)NAN : s.l, log_l = log(l);
  const double logp = ((double)zy - (double)s.m) * unit - log_l;
  p.logps[row] = (float)logp;
  p.lse[row] = (double)s.m * unit + log_l;
  if constexpr (STATS) {
    const double nan = logp != logp ? logp : 0.0;
    if (p.entropy) p.entropy[row] = (float)(log_l - s.weighted / l * unit + nan);
    if (p.mean_logits) p.mean_logits[row] = (float)(s.total * unit / (double)p.V + nan);
    if (p.is_top1) {
      // With unit = 0 (logit_scale = 0) all are the maximum.
      const bool first = unit == 0 ? y == 0 : zy >= s.m && s.beaten == 0;
      p.is_top1[row] = (float)((first ? 1.0 : 0.0) + nan);
    }
    if (p.log_sum_sq_probs) p.log_sum_sq_probs[row] = (float)(log(s.squares) - 2 * log_l + nan);
  }
}

// A warp's: an item's results from the sums of the block's warps.
template <bool STATS, int WARPS>
DPO_DEVICE void finish_item(const Arguments& a, int row, int part, int y, float zy,
                            const Partial* warps) {
  const int lane = threadIdx.x % WARP;
  Sums<STATS> sums;
  if (lane < WARPS) sums = as_sums<STATS>(warps[lane]);
  merge_warp(sums, a.scaling.k);
  if (a.splits > 1) {
    uint32_t before = 0;
    if (lane == 0) {
      a.partials[(int64_t)row * a.splits + part] = as_partial(sums);
      before = add_acq_rel(a.parts_done + row, 1);
    }
    before = __shfl_sync(FULL, before, 0);
    if (before != (uint32_t)a.splits - 1) return;
    sums = Sums<STATS>();
    for (int i = lane; i < a.splits; i += WARP) {
      Sums<STATS> other = load_sums<STATS>(a.partials + (int64_t)row * a.splits + i);
      const float top = fmaxf(sums.m, other.m);
      raise_max(sums, top, a.scaling.k);
      raise_max(other, top, a.scaling.k);
      sums.l += other.l;
      if constexpr (STATS) {
        sums.weighted += other.weighted;
        sums.squares += other.squares;
        sums.total += other.total;
        sums.beaten = fmaxf(sums.beaten, other.beaten);
      }
    }
    merge_warp(sums, a.scaling.k);
    if (lane == 0) a.parts_done[row] = 0;
  }
  if (lane == 0) store_row(a, row, y, zy, sums);
}

// The scout's work: item i + 2 is found while item i is read, then item i is finished.
template <class T, bool SOFTCAP, bool STATS, class C>
DPO_DEVICE void scout(const Arguments& a, Shared<C>& shared) {
  bool more = true;
#pragma unroll 1
  for (int i = -2;; ++i) {
    int row = -1, part = 0, y = 0;
    float zy = 0;
    if (i >= 0) {
      const Item& item = shared.items[i % 3];
      row = item.row, part = item.part, y = item.y, zy = item.zy;
      if (row < 0) break;
    }
    more = find_item<T, SOFTCAP>(a, &shared.items[(i + 2) % 3], more);
    if (i >= -1) block_barrier();
    if (i >= 0) finish_item<STATS, C::WARPS>(a, row, part, y, zy, shared.warps[i % 2]);
  }
  // Every block has taken its last ticket when the last one arrives here.
  if (threadIdx.x % WARP == 0 && add_acq_rel(&a.counters->finished, 1) == gridDim.x - 1) {
    a.counters->ticket = 0;
    a.counters->finished = 0;
  }
}

// The vectors of an item that this thread copies and adds.
template <class T, class C>
struct Stream16 {
  const Vec* base = nullptr;
  int next = 0, end = 0;  // this thread's next vector, and the item's end
  int stages = 0;  // still to copy

  static constexpr int STEP = C::THREADS * C::VECTORS;

  DPO_DEVICE void open(const Item& item) {
    base = (const Vec*)((const T*)item.x + item.head);
    end = item.end;
    stages = (end - item.first + STEP - 1) / STEP;
    next = item.first + threadIdx.x;
  }
};

template <class T, bool SOFTCAP, bool STATS, class C>
__global__ void __launch_bounds__(C::THREADS + WARP, C::BLOCKS)
    forward(const __grid_constant__ Arguments a) {
  constexpr int N = Elements<T>::N;
  Shared<C>& shared = *(Shared<C>*)shared_memory();
  const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
  if (warp == C::WARPS) return scout<T, SOFTCAP, STATS>(a, shared);
  block_barrier();
  Stream16<T, C> copy, use;
  int copied = -1;  // the item `copy` is in, counted as `i`
  int slot = 0;  // of the ring, the next to use and then to fill
  int ahead = 0;  // stages copied and not yet used
  for (int i = 0;; ++i) {
    const Item& item = shared.items[i % 3];
    if (item.row < 0) break;
    const int y = item.y, head = item.head;
    const float zy = item.zy;
    use.open(item);
    // What lies before the first and after the last whole vector: an element a thread, loaded now
    // and added last.
    int edge_column = -1;
    float edge = 0;
    if (item.part == 0) {
      if (thread < head) edge_column = thread;
      if (thread >= N && thread - N < item.tail) edge_column = a.V - item.tail + thread - N;
      if (edge_column >= 0) edge = turned(a.scaling, ((const T*)item.x)[edge_column]);
    }
    Sums<STATS> sums;
    auto copy_stage = [&](int to) {
      while (copy.stages == 0) {
        if (copied > i) return;  // the item after the next is not known yet
        const Item& following = shared.items[(copied + 1) % 3];
        if (following.row < 0) return;
        copy.open(following);
        ++copied;
      }
#pragma unroll
      for (int v = 0; v < C::VECTORS; ++v)
        if (copy.next + v * C::THREADS < copy.end)
          async_copy(&shared.ring[to][v][thread], copy.base + copy.next + v * C::THREADS);
      copy.next += C::VECTORS * C::THREADS;
      async_commit();
      --copy.stages;
      ++ahead;
    };
    while (ahead < C::STAGES) {
      const int before = ahead;
      copy_stage((slot + ahead) % C::STAGES);
      if (ahead == before) break;
    }
    for (; use.stages; --use.stages) {
      if (ahead == C::STAGES)
        async_wait<C::STAGES - 1>();
      else
        async_wait<0>();
      const int left = use.end - use.next;  // vectors of a stage lie THREADS apart
      const bool whole = left > (C::VECTORS - 1) * C::THREADS;
      const int column = head + use.next * N;
      if (whole) {
        Vec v[C::VECTORS];
#pragma unroll
        for (int j = 0; j < C::VECTORS; ++j) v[j] = shared.ring[slot][j][thread];
        --ahead;
        copy_stage(slot);  // this thread has read the slot, which it fills again
        add<T, SOFTCAP>(sums, v, a.scaling, zy, y,
                        [column](int i) { return column + i / N * C::THREADS * N + i % N; });
      } else {
#pragma unroll 1
        for (int j = 0; j * C::THREADS < left; ++j) {
          const Vec v[1] = {shared.ring[slot][j][thread]};
          const int first = column + j * C::THREADS * N;
          add<T, SOFTCAP>(sums, v, a.scaling, zy, y, [first](int i) { return first + i; });
        }
        --ahead;
        copy_stage(slot);
      }
      slot = slot + 1 == C::STAGES ? 0 : slot + 1;
      use.next += C::VECTORS * C::THREADS;
    }
    if (edge_column >= 0) add_one<SOFTCAP>(sums, edge, a.scaling, zy, y, edge_column);
    merge_warp(sums, a.scaling.k);
    if (lane == 0) shared.warps[i % 2][warp] = as_partial(sums);
    block_barrier();
  }
}

template <class T, bool SOFTCAP, bool STATS>
cudaError_t run_forward(const Arguments& a, int sms, void* stream) {
  using C = std::conditional_t<STATS, RichForward, Forward>;
  const int64_t resident = (int64_t)sms * C::BLOCKS, items = (int64_t)a.rows * a.splits;
  const int64_t blocks = items < resident ? (items ? items : 1) : resident;
  return launch(forward<T, SOFTCAP, STATS, C>, dim3((unsigned)blocks), C::THREADS + WARP,
                sizeof(Shared<C>), stream, a);
}

template <class T, bool SOFTCAP>
cudaError_t choose_forward(const Arguments& a, int sms, void* stream) {
  const TokenLogps& p = a.p;
  if (p.entropy || p.mean_logits || p.is_top1 || p.log_sum_sq_probs)
    return run_forward<T, SOFTCAP, true>(a, sms, stream);
  return run_forward<T, SOFTCAP, false>(a, sms, stream);
}

template <class T>
cudaError_t choose_softcap(const Arguments& a, int sms, void* stream) {
  return a.p.transform.softcap != 0 ? choose_forward<T, true>(a, sms, stream)
                                    : choose_forward<T, false>(a, sms, stream);
}

}  // namespace token_logps_kernels

int token_logps_splits(int64_t rows, int64_t V, DType dtype, int device) {
  int sms = 0;
  if (rows <= 0 || multiprocessors(device, sms) != cudaSuccess || rows >= sms) return 1;
  const int64_t wanted = (2 * sms + rows - 1) / rows;
  const int64_t vectors = V * (dtype == DType::f32 ? 4 : 2) / 16;
  const int64_t most = vectors / (Forward::THREADS * Forward::VECTORS);  // a stage each at least
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : (int)splits;
}

int64_t token_logps_counters(int64_t rows) { return (int64_t)sizeof(Counters) + 4 * rows; }

int64_t token_logps_scratch(int64_t rows, int splits) {
  return splits > 1 ? rows * splits * (int64_t)sizeof(Partial) : 0;
}

const char* token_logps(const TokenLogps& p, int splits, void* counters, void* scratch, Stream to) {
  if (const char* why = too_large(p.R * p.T * splits, p.V)) return why;
  Arguments a;
  a.p = p;
  a.scaling = Scaling::of(p.transform);
  a.rows = (int)(p.R * p.T);
  a.V = (int)p.V;
  a.splits = splits;
  a.counters = (Counters*)counters;
  a.parts_done = (uint32_t*)(a.counters + 1);
  a.partials = (Partial*)scratch;
  if (a.rows == 0) return nullptr;
  return on_device(to, [&] {
    int sms = 0;
    const cudaError_t e = multiprocessors(to.device, sms);
    if (e != cudaSuccess) return e;
    switch (p.dtype) {
      case DType::f32: return choose_softcap<float>(a, sms, to.stream);
      case DType::bf16: return choose_softcap<bf16>(a, sms, to.stream);
      default: return choose_softcap<f16>(a, sms, to.stream);
    }
  });
}

}  // namespace cuda
}  // namespace dpo
