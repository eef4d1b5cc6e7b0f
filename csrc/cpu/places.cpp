// Labels as targets, and the scored rows of a batch: packed, and back in their places.
#include <algorithm>
#include <cstring>

#include "functions.h"

namespace dpo {
namespace {

constexpr int64_t SMALL = 1 << 18;  // bytes that one thread copies

}  // namespace

bool targets_of(const int64_t* labels, int64_t S, int64_t T, int64_t V, int64_t ignore_index,
                bool shift, int64_t* targets, int64_t* lengths) {
  for (int64_t s = 0; s < S; ++s) {
    const int64_t* row = labels + s * T;
    lengths[s] = 0;
    for (int64_t t = 0; t < T; ++t) {
      const bool scored = row[t] != ignore_index;
      if (scored && (row[t] < 0 || row[t] >= V)) return false;
      lengths[s] += scored && (t > 0 || !shift);
    }
    if (shift && T) {
      std::copy(row + 1, row + T, targets + s * T);
      targets[s * T + T - 1] = ignore_index;
    }
  }
  return true;
}

void packed(const SequenceSum& p, int64_t N, int64_t whole, int64_t* places) {
  int64_t *boundaries = places + whole, *targets = boundaries + p.S + 1, n = 0;
  for (int64_t s = 0; s < p.S; ++s) {
    boundaries[s] = n;
    for (int64_t i = p.starts[s]; i < p.starts[s + 1] && n < N; ++i)
      if (p.targets[i] != p.ignore_index) {
        places[n] = i;
        targets[n++] = p.targets[i];
      }
  }
  boundaries[p.S] = n;
  std::fill(places + n, places + whole, n ? places[0] : 0);
}

void rows_at(const int64_t* places, int64_t n, const char* from, int64_t size, char* rows) {
#pragma omp parallel for if (n * size > SMALL)
  for (int64_t i = 0; i < n; ++i) std::memcpy(rows + i * size, from + places[i] * size, size);
}

void rows_back(const int64_t* places, int64_t n, const char* rows, int64_t size, int64_t all,
               char* out) {
#pragma omp parallel for if (all * size > SMALL)
  for (int64_t i = 0; i <= n; ++i) {
    // The row, and the zeros between the one before it and it.
    const int64_t start = i ? places[i - 1] + 1 : 0, end = i < n ? places[i] : all;
    std::memset(out + start * size, 0, (end - start) * size);
    if (i < n) std::memcpy(out + end * size, rows + i * size, size);
  }
}

}  // namespace dpo
