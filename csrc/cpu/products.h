// Products of bf16 matrices, summed and written in fp32, on CPUs that multiply bf16 pairs.
#pragma once

#include <cstdint>

namespace dpo {

struct Matrix {  // bf16; one of the strides, in elements, is 1
  const uint16_t* data;
  int64_t row, column;
};

// Whether this build and this processor have them (AVX512-BF16).
bool has_bf16_products();

// out [M, N] = a [M, K] @ b [K, N], or out += a @ b; rows of `out` are `stride` apart. An element is
// summed in the same order whatever M, N and the number of threads.
void bf16_product(Matrix a, Matrix b, float* out, int64_t stride, int64_t M, int64_t N, int64_t K,
                  bool add);

}  // namespace dpo
