// Just enough of CUDA for the device code of csrc/cuda to compile as C++ and run on the host: for
// tests alone, on small shapes. It proves logic, not speed.
//
// A CUDA thread is a fibre, or a host thread where CUDA_ON_HOST_THREADS is defined (for
// ThreadSanitizer, which then sees the races of a missing barrier). Several blocks of a grid are
// alive at once and take turns at barriers, in an order that changes all the time. Asynchronous
// copies arrive only when they are waited for; until then their place holds NaN. Shared memory
// starts as garbage. A barrier or a shuffle that not all threads reach ends the program, and so does
// a launch that does not end.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
};

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;
constexpr int cudaDevAttrMultiProcessorCount = 16;
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

namespace host {

// Multiprocessors of the pretended device: few, so that small tests meet every schedule.
#ifdef CUDA_ON_HOST_RECORD
inline int sms = 132;
#else
inline int sms = 2;
#endif

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
#ifdef CUDA_ON_HOST_THREADS
  std::mutex mutex;
  std::condition_variable changed;
#endif
};

struct Block {
  Barrier barrier;
  std::deque<Barrier> warps;
  std::vector<std::array<uint64_t, 32>> slots;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared = nullptr;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  dim3 index{0}, block_index{0}, grid{1};
  Block* block = nullptr;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  bool done = false;
#ifndef CUDA_ON_HOST_THREADS
  ucontext_t context;
  std::unique_ptr<char[]> stack;
#endif
};

inline thread_local Thread* current = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

#ifdef CUDA_ON_HOST_THREADS

inline void leave(Barrier& b) {  // with its mutex held
  if (b.expected && b.arrived == b.expected) {
    b.arrived = 0;
    ++b.generation;
    b.changed.notify_all();
  }
}

inline void wait(Barrier& b) {
  std::unique_lock<std::mutex> lock(b.mutex);
  const uint64_t mine = b.generation;
  ++b.arrived;
  leave(b);
  if (!b.changed.wait_for(lock, std::chrono::seconds(60), [&] { return b.generation != mine; }))
    fail("a barrier or a shuffle was not reached by all threads");
}

inline void finish(Thread& t, Barrier& warp) {
  for (Barrier* b : {&t.block->barrier, &warp}) {
    std::lock_guard<std::mutex> lock(b->mutex);
    --b->expected;
    leave(*b);
  }
}

#else

inline ucontext_t scheduler;
inline bool progress;  // since the scheduler last looked
inline const std::function<void()>* body;

inline void leave(Barrier& b) {
  if (b.expected && b.arrived == b.expected) {
    b.arrived = 0;
    ++b.generation;
  }
}

inline void wait(Barrier& b) {
  const uint64_t mine = b.generation;
  ++b.arrived;
  progress = true;
  leave(b);
  while (b.generation == mine) swapcontext(&current->context, &scheduler);
  progress = true;
}

inline void finish(Thread& t, Barrier& warp) {
  for (Barrier* b : {&t.block->barrier, &warp}) {
    --b->expected;
    leave(*b);
  }
}

inline void fibre() {
  (*body)();
  Thread& t = *current;
  finish(t, t.block->warps[t.index.x / 32]);
  t.done = progress = true;
  swapcontext(&t.context, &scheduler);
}

#endif

// An atomic addition. Other blocks get their turn around it: what they share is passed on here.
template <int ORDER>
uint32_t add(uint32_t* p, uint32_t n) {
#ifdef CUDA_ON_HOST_THREADS
  std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
  return __atomic_fetch_add(p, n, ORDER);
}

inline unsigned char* shared_memory() { return current->block->shared; }

// Arrivals in 8 bytes: how many make a round, how many of them are missing, the round.
inline uint64_t arrivals(uint64_t count, uint64_t missing, uint64_t round) {
  return count | missing << 16 | round << 32;
}

inline void begin_arrivals(uint64_t* state, int count) {
  __atomic_store_n(state, arrivals(count, count, 0), __ATOMIC_RELEASE);
}

inline void arrive(uint64_t* state) {
  uint64_t now = __atomic_load_n(state, __ATOMIC_ACQUIRE), next;
  do {
    const uint64_t count = now & 0xffff, missing = now >> 16 & 0xffff, round = now >> 32;
    if (!missing) fail("arrivals were not begun");
    next = missing > 1 ? arrivals(count, missing - 1, round) : arrivals(count, count, round + 1);
  } while (
      !__atomic_compare_exchange_n(state, &now, next, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
}

inline bool over(const uint64_t* state,
                 unsigned round) {  // or the one two before it, as on a device
  return ((__atomic_load_n(state, __ATOMIC_ACQUIRE) >> 32 ^ round) & 1) != 0;
}

// Who does not wait may be too early: every third answer is no.
inline bool arrived(const uint64_t* state, unsigned round) {
  static thread_local unsigned asked = 0;
  return ++asked % 3 && over(state, round);
}

inline void wait_for(const uint64_t* state, unsigned round) {
#ifdef CUDA_ON_HOST_THREADS
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!over(state, round)) {
    if (std::chrono::steady_clock::now() > until) fail("not all that were waited for arrived");
    std::this_thread::yield();
  }
#else
  while (!over(state, round)) swapcontext(&current->context, &scheduler);
  progress = true;
#endif
}

inline void async_copy(void* to, const void* from, size_t bytes) {
  if (((uintptr_t)to | (uintptr_t)from) % bytes) fail("an asynchronous copy is not aligned");
  std::memset(to, 0xff, bytes);  // NaN until it arrives
  current->open.push_back({to, from, bytes});
}

inline void async_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

inline void async_wait(int pending) {
  for (auto& groups = current->groups; (int)groups.size() > pending; groups.pop_front())
    for (const Copy& c : groups.front()) std::memcpy(c.to, c.from, c.bytes);
}

inline void run_blocks(dim3 grid, unsigned from, unsigned alive, int threads, size_t shared,
                       const std::function<void()>& f) {
  static unsigned order = 1;
  const int warps = (threads + 31) / 32;
  std::deque<Block> blocks(alive);
  std::deque<Thread> all(alive * (size_t)threads);
  for (unsigned b = 0; b < alive; ++b) {
    blocks[b].barrier.expected = threads;
    blocks[b].warps.resize(warps);
    blocks[b].slots.resize(warps);
    blocks[b].storage.reset(new unsigned char[shared + 16]);
    std::memset(blocks[b].storage.get(), 0xcd, shared + 16);
    blocks[b].shared = (unsigned char*)(((uintptr_t)blocks[b].storage.get() + 15) & ~(uintptr_t)15);
    for (int t = 0; t < threads; ++t) {
      ++blocks[b].warps[t / 32].expected;
      Thread& thread = all[b * (size_t)threads + t];
      thread.index.x = t;
      thread.block_index.x = from + b;
      thread.grid = grid;
      thread.block = &blocks[b];
    }
  }
#ifdef CUDA_ON_HOST_THREADS
  std::vector<std::thread> running;
  std::atomic<size_t> missing{all.size()};  // all start together: no block is done before the next
  for (Thread& t : all)
    running.emplace_back([&t, &f, &missing] {
      current = &t;
      for (--missing; missing;) std::this_thread::yield();
      f();
      finish(t, t.block->warps[t.index.x / 32]);
    });
  for (std::thread& t : running) t.join();
  (void)order;
#else
  constexpr size_t STACK = 256 << 10;
  body = &f;
  for (Thread& t : all) {
    t.stack.reset(new char[STACK]);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = STACK;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fibre, 0);
  }
  for (size_t left = all.size(); left;) {
    progress = false;
    order = order * 1664525u + 1013904223u;
    const size_t start = order % all.size();
    for (size_t i = 0; i < all.size(); ++i) {
      Thread& t = all[(start + i) % all.size()];
      if (t.done) continue;
      current = &t;
      swapcontext(&scheduler, &t.context);
      if (t.done) --left;
    }
    if (!progress) fail("a barrier or a shuffle was not reached by all threads");
  }
#endif
  for (const Thread& t : all)
    if (!t.groups.empty() || !t.open.empty()) fail("a thread ended with copies in flight");
}

// Ends the program if it is not gone within a minute: a kernel without end must not hang a test.
struct Watchdog {
  std::mutex mutex;
  std::condition_variable changed;
  bool gone = false;
  std::thread thread{[this] {
    std::unique_lock<std::mutex> lock(mutex);
    if (!changed.wait_for(lock, std::chrono::seconds(60), [this] { return gone; }))
      fail("a launch did not end within a minute");
  }};
  ~Watchdog() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      gone = true;
    }
    changed.notify_all();
    thread.join();
  }
};

inline void launch(dim3 grid, int threads, size_t shared, const std::function<void()>& f) {
#ifdef CUDA_ON_HOST_RECORD  // written down, not run: real shapes at the real configuration
  FILE* file = std::fopen(std::getenv("CUDA_ON_HOST_RECORD"), "a");
  std::fprintf(file, "%u %d %zu\n", grid.x, threads, shared);
  std::fclose(file);
  return;
#endif
  constexpr unsigned WAVE = 6;  // blocks alive at once
  Watchdog watchdog;
  for (unsigned from = 0; from < grid.x; from += WAVE)
    run_blocks(grid, from, std::min(WAVE, grid.x - from), threads, shared, f);
}

}  // namespace host

#define threadIdx (::host::current->index)
#define blockIdx (::host::current->block_index)
#define gridDim (::host::current->grid)

inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = host::sms;
  return cudaSuccess;
}

inline void __syncthreads() { host::wait(host::current->block->barrier); }
inline void __syncwarp() { host::wait(host::current->block->warps[threadIdx.x / 32]); }

template <class T>
T host_shuffle(T x, int from) {
  static_assert(sizeof(T) <= 8, "a lane's slot has 8 bytes");
  auto& slots = host::current->block->slots[threadIdx.x / 32];
  std::memcpy(&slots[threadIdx.x % 32], &x, sizeof(T));
  __syncwarp();
  std::memcpy(&x, &slots[from], sizeof(T));
  __syncwarp();
  return x;
}

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return host_shuffle(x, lane);
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return host_shuffle(x, (int)(threadIdx.x % 32) ^ mask);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  auto& slots = host::current->block->slots[threadIdx.x / 32];
  slots[threadIdx.x % 32] = vote;
  __syncwarp();
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (unsigned)slots[lane] << lane;
  __syncwarp();
  return votes;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
