// Which rows belong to which sequence, on the device.
#pragma once

#include "device.h"

namespace dpo {
namespace cuda {

// First row of sequence s. Boundaries that point outside are cut: nothing is read out of bounds.
DPO_DEVICE int64_t first_row(const int64_t* starts, int64_t s, int64_t rows, int64_t T) {
  const int64_t row = starts ? starts[s] : s * T;
  return row < 0 ? 0 : row > rows ? rows : row;
}

// The sequence that `row` belongs to; -1 if none.
DPO_DEVICE int64_t sequence_of(const int64_t* starts, int64_t S, int64_t row, int64_t T) {
  if (!starts) return row / T;
  int64_t lo = 0, hi = S;  // the last s with starts[s] <= row
  while (lo < hi) {
    const int64_t middle = (lo + hi + 1) / 2;
    if (starts[middle] <= row)
      lo = middle;
    else
      hi = middle - 1;
  }
  return lo < S && starts[lo] <= row ? lo : -1;
}

}  // namespace cuda
}  // namespace dpo
