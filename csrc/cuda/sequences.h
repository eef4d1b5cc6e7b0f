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

}  // namespace cuda
}  // namespace dpo
