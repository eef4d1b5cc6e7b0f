// Log-prob, log-sum-exp and statistics of each scored row in one read.
//
// A persistent grid takes items, (row, part of the row), in order from a ticket: a block that meets
// unscored rows takes more of them. One warp of each block, the scout, looks ahead for scored items
// and finishes those that were read, so that skipping rows, where a row lies and what is made of its
// sums cost the others nothing. Each thread of the others keeps STAGES groups of 16-byte copies in
// flight into shared memory that it alone reads, across the ends of rows too. No warp waits for
// another but the scout: a warp that is done with an item says so and goes on, up to AHEAD items
// from the slowest. A thread carries its maximum in fp32 and its sum in fp64 and rescales only when
// a group of elements raises its maximum. No result depends on which block took which item:
// reductions are in fixed order, and parts of a row are combined in order by the block that finishes
// last.
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
#define DPO_FORWARD_RICH_CONFIG 352, 3, 2, 2
#endif
#ifndef DPO_FORWARD_CAPPED_CONFIG  // with statistics of soft-capped logits, which need more of them
#define DPO_FORWARD_CAPPED_CONFIG 352, 2, 4, 2
#endif

template <int THREADS_, int VECTORS_, int STAGES_, int BLOCKS_>
struct Config {
  static constexpr int THREADS = THREADS_, VECTORS = VECTORS_, STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr int WARPS = THREADS / WARP;
};
using Forward = Config<DPO_FORWARD_CONFIG>;
using RichForward = Config<DPO_FORWARD_RICH_CONFIG>;
using CappedForward = Config<DPO_FORWARD_CAPPED_CONFIG>;

// Zero before and after every launch.
struct Counters {
  uint32_t ticket;  // taken, besides each block's first
  uint32_t finished;  // blocks
  // then uint32_t [rows] parts done
};

struct Item {
  int row;  // -1: no more
  int part;
  int y;  // the target
  float zy;  // its scaled logit, for statistics
  const void* x;  // the row
  int head, tail;  // elements outside the whole vectors
  int first, end;  // the part's vectors, counted in the row
};

// Items found and not yet finished, at most: more would leave the last ones to few blocks.
constexpr int AHEAD = 2;

// Of item i all but the ring lies at i % AHEAD.
template <class C>
struct Shared {
  Vec ring[C::STAGES][C::VECTORS][C::THREADS];
  Partial warps[AHEAD][C::WARPS];
  Item items[AHEAD];
  Arrivals found[AHEAD], read[AHEAD];  // the scout's, and the other warps'
};

// Of 100 KB a multiprocessor of sm_86, 89 and 120; a block costs 1 KB besides its own.
template <class C>
constexpr bool FITS = C::BLOCKS * (sizeof(Shared<C>) + 1024) <= 100 * 1024;
static_assert(FITS<Forward> && FITS<RichForward> && FITS<CappedForward>,
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

// A warp's tickets: the next is on its way while one is looked at.
struct Tickets {
  const Arguments& a;
  unsigned next = blockIdx.x;

  DPO_DEVICE explicit Tickets(const Arguments& a) : a(a) {}

  // Less than all items; -1 after the last.
  DPO_DEVICE int take() {
    const unsigned ticket = __shfl_sync(FULL, next, 0);
    if (ticket >= (unsigned)a.rows * a.splits) return -1;
    if (threadIdx.x % WARP == 0) next = add_relaxed(&a.counters->ticket, 1) + gridDim.x;
    return (int)ticket;
  }
};

// A warp's: the next scored item; rows that are not scored are written on the way.
template <class T>
DPO_DEVICE Item find_item(const Arguments& a, Tickets& tickets) {
  Item item{};
  item.row = -1;
  for (int ticket; (ticket = tickets.take()) >= 0;) {
    const int row = ticket / a.splits;
    const int64_t y = a.p.targets[row];
    item.part = ticket % a.splits;
    if (y != a.p.ignore_index && y >= 0 && y < a.p.V) {
      const T* x = row_at((const T*)a.p.logits, a.p.stride_r, a.p.stride_t, a.p.T, row);
      const Span span = span_of(x, a.V);
      item.row = row;
      item.y = (int)y;
      item.x = x;
      item.head = span.head;
      item.tail = span.tail;
      item.first = part_of(span.vectors, item.part, a.splits);
      item.end = part_of(span.vectors, item.part + 1, a.splits);
      break;
    }
    if (item.part || threadIdx.x % WARP) continue;
    const float value = y == a.p.ignore_index ? 0.0f : NAN;
    a.p.logps[row] = value;
    a.p.lse[row] = value;
    for (float* stat : {a.p.entropy, a.p.mean_logits, a.p.is_top1, a.p.log_sum_sq_probs})
      if (stat) stat[row] = value;
  }
  return item;
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

// The scout's work: items are found ahead of the slowest warp, then item i is finished.
template <class T, bool SOFTCAP, bool STATS, class C>
DPO_DEVICE void scout(const Arguments& a, Shared<C>& shared) {
  const int lane = threadIdx.x % WARP;
  Tickets tickets(a);
  T target{};  // the target's logit of item i, in lane i % AHEAD: loaded while the item is read
  bool more = true;
  int found = 0;
#pragma unroll 1
  for (int i = 0;; ++i) {
    for (; more && found < i + AHEAD; ++found) {
      const int slot = found % AHEAD;
      Item item = find_item<T>(a, tickets);
      more = item.row >= 0;
      if (more && lane == slot) target = ((const T*)item.x)[item.y];
      if constexpr (STATS) {
        if (lane == slot) item.zy = scaled<SOFTCAP>(a.scaling, turned(a.scaling, target));
      }
      if (lane == slot) {
        shared.items[slot] = item;
        arrive(&shared.found[slot]);
      }
    }
    __syncwarp();
    const int slot = i % AHEAD;
    const Item& item = shared.items[slot];
    const int row = item.row, part = item.part, y = item.y;
    if (row < 0) break;
    wait_for(&shared.read[slot], i / AHEAD);
    float zy = scaled<SOFTCAP>(a.scaling, turned(a.scaling, target));
    zy = __shfl_sync(FULL, zy, slot);
    finish_item<STATS, C::WARPS>(a, row, part, y, zy, shared.warps[slot]);
  }
  // Every block has taken its last ticket when the last one arrives here.
  if (lane == 0 && add_acq_rel(&a.counters->finished, 1) == gridDim.x - 1) {
    a.counters->ticket = 0;
    a.counters->finished = 0;
  }
}

// The vectors of an item that this thread copies and adds, a stage at a time. A warp's begin on a
// line of 128 bytes wherever the row does.
template <class T, class C>
struct Stream16 {
  const Vec* base = nullptr;
  int next = 0, end = 0;  // this thread's next vector, and the item's end

  static constexpr int STEP = C::THREADS * C::VECTORS;

  DPO_DEVICE void open(const Item& item) {
    base = (const Vec*)((const T*)item.x + item.head);
    end = item.end;
    next = item.first + threadIdx.x - (int)(((uintptr_t)(base + item.first) >> 4) & (LINE - 1));
    if (next < item.first) next += C::THREADS;
  }

  DPO_DEVICE bool done() const { return next >= end; }
};

// The column outside the whole vectors that is a thread's; -1: none.
template <int N>
DPO_DEVICE int edge_of(const Item& item, int V, int thread) {
  if (item.part) return -1;
  if (thread < item.head) return thread;
  return thread >= N && thread - N < item.tail ? V - item.tail + thread - N : -1;
}

// Adds a thread's last vectors of an item, fewer than a stage: COUNT, of which those beyond `left`
// (THREADS apart) do not exist and count as -inf.
template <int COUNT, class T, class C>
DPO_DEVICE void add_filled(Sums<false>& sums, const Vec (&ring)[C::VECTORS][C::THREADS], int left,
                           const Scaling& c) {
  const uint32_t nothing = Elements<T>::LOWEST ^ c.sign ^ (sizeof(T) == 2 ? c.sign >> 16 : 0);
  Vec v[COUNT];
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    v[j] = ring[j][threadIdx.x];
    if (j && j * C::THREADS >= left) v[j] = {{nothing, nothing, nothing, nothing}};
  }
  add<T, false>(sums, v, c, 0.0f, 0, [](int) { return 0; });
}

template <class T, bool SOFTCAP, bool STATS, class C>
__global__ void __launch_bounds__(C::THREADS + WARP, C::BLOCKS)
    forward(const __grid_constant__ Arguments a) {
  constexpr int N = Elements<T>::N;
  Shared<C>& shared = *(Shared<C>*)shared_memory();
  const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
  if (thread < AHEAD) {
    begin_arrivals(&shared.found[thread], 1);
    begin_arrivals(&shared.read[thread], C::WARPS);
  }
  block_barrier();
  if (warp == C::WARPS) return scout<T, SOFTCAP, STATS>(a, shared);
  Stream16<T, C> copy, use;
  int copied = -1;  // the item `copy` is in, counted as `i`
  int slot = 0;  // of the ring, the next to use
  int ahead = 0;  // stages copied and not yet used up
  for (int i = 0;; ++i) {
    wait_for(&shared.found[i % AHEAD], i / AHEAD);
    const Item& item = shared.items[i % AHEAD];
    if (item.row < 0) break;
    use.open(item);
    // What lies before the first and after the last whole vector: an element a thread, loaded now
    // and added last.
    float edge = 0;
    if (const int column = edge_of<N>(item, a.V, thread); column >= 0)
      edge = turned(a.scaling, ((const T*)item.x)[column]);
    Sums<STATS> sums;
    auto copy_stage = [&] {
      while (copy.done()) {
        const int next = copied + 1;
        if (next > i && !arrived(&shared.found[next % AHEAD], next / AHEAD)) return;
        const Item& following = shared.items[next % AHEAD];
        if (following.row < 0) return;
        copy.open(following);
        copied = next;
      }
      const int to = (slot + ahead) % C::STAGES;
#pragma unroll
      for (int v = 0; v < C::VECTORS; ++v)
        if (copy.next + v * C::THREADS < copy.end)
          async_copy(&shared.ring[to][v][thread], copy.base + copy.next + v * C::THREADS);
      copy.next += copy.STEP;
      async_commit();
      ++ahead;
    };
    for (int k = ahead; k < C::STAGES; ++k) copy_stage();
    for (; !use.done(); use.next += use.STEP) {
      if (ahead == C::STAGES)
        async_wait<C::STAGES - 1>();
      else
        async_wait<0>();
      const int left = use.end - use.next;  // vectors of a stage lie THREADS apart
      // Read where it is needed: statistics have no register to spare.
      const float zy = STATS ? item.zy : 0;
      const auto column = [&item, &use](int j, int i) {
        return item.head + (use.next + j * C::THREADS) * N + i;
      };
      const auto& ring = shared.ring[slot];
      if (left > (C::VECTORS - 1) * C::THREADS) {
        Vec v[C::VECTORS];
#pragma unroll
        for (int j = 0; j < C::VECTORS; ++j) v[j] = ring[j][thread];
        copy_stage();  // this thread has read the slot, which it may fill again
        add<T, SOFTCAP>(sums, v, a.scaling, zy, item.y,
                        [column](int i) { return column(i / N, i % N); });
      } else {
        bool filled = false;
        if constexpr (!SOFTCAP && !STATS) {
          filled = a.scaling.k > 0;
          if (filled && left > C::VECTORS / 2 * C::THREADS)
            add_filled<C::VECTORS, T, C>(sums, ring, left, a.scaling);
          else if (filled)
            add_filled<C::VECTORS / 2, T, C>(sums, ring, left, a.scaling);
        }
#pragma unroll 1
        for (int j = 0; !filled && j * C::THREADS < left; ++j) {
          const Vec v[1] = {ring[j][thread]};
          add<T, SOFTCAP>(sums, v, a.scaling, zy, item.y,
                          [column, j](int i) { return column(j, i); });
        }
        copy_stage();
      }
      --ahead;
      slot = slot + 1 == C::STAGES ? 0 : slot + 1;
    }
    if (const int column = edge_of<N>(item, a.V, thread); column >= 0)
      add_one<SOFTCAP>(sums, edge, a.scaling, item.zy, item.y, column);
    merge_warp(sums, a.scaling.k);
    if (lane == 0) {
      shared.warps[i % AHEAD][warp] = as_partial(sums);
      arrive(&shared.read[i % AHEAD]);
    }
  }
}

template <class T, bool SOFTCAP, bool STATS>
cudaError_t run_forward(const Arguments& a, int sms, void* stream) {
  using Rich = std::conditional_t<SOFTCAP, CappedForward, RichForward>;
  using C = std::conditional_t<STATS, Rich, Forward>;
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
