// A tile of the result belongs to a thread. It copies blocks of both operands into the order in which
// the innermost product reads them: pairs of K side by side, as one instruction takes them, groups of
// MR rows of `a` and of NR columns of `b` one after the other, missing ones as zeros.
#include "products.h"

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace dpo::products {
namespace {

// MR x NR sums in 24 registers, four more for a row of `b`. A block of `b` of NR columns is read MC / MR
// times from L2; one of `a` stays in L1.
constexpr int MR = 6, NR = 64, LANES = 16;
constexpr int64_t KC = 512, MC = 384, NC = 512;
constexpr int64_t LEAST_M = 8 * MR, LEAST_N = NR;  // of a tile that is cut for more threads

inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

inline uint32_t pair(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }

// Pairs of `count` neighbours in two rows of K: out[i] = (first[i], second[i]).
inline void interleave(const uint16_t* first, const uint16_t* second, int64_t count,
                       uint32_t* out) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(first + i)));
    __m512i high = second ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(second + i)))
                          : _mm512_setzero_si512();
    _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  for (; i < count; ++i) out[i] = pair(first[i], second ? second[i] : 0);
}

// 16 x 16 pairs of rows that are `stride` elements apart, transposed: out[p * NR + row].
inline void transpose(const uint16_t* from, int64_t stride, uint32_t* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // r[4 g + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    __m512i b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    __m512i d = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    __m512i e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_si512(out + (c + 0) * NR, _mm512_shuffle_i32x4(a, d, 0x88));
    _mm512_storeu_si512(out + (c + 4) * NR, _mm512_shuffle_i32x4(b, e, 0x88));
    _mm512_storeu_si512(out + (c + 8) * NR, _mm512_shuffle_i32x4(a, d, 0xdd));
    _mm512_storeu_si512(out + (c + 12) * NR, _mm512_shuffle_i32x4(b, e, 0xdd));
  }
}

// Columns [0, n) of b [k, n] as groups of NR: out[group][k / 2][NR].
void pack_b(Matrix b, int64_t k, int64_t n, uint32_t* out) {
  const int64_t pairs = blocks(k, 2);
  for (int64_t from = 0; from < n; from += NR, out += pairs * NR) {
    const int64_t width = std::min<int64_t>(NR, n - from);
    if (width < NR) std::memset(out, 0, pairs * NR * sizeof *out);
    if (b.column == 1) {
      const uint16_t* row = b.data + from;
      for (int64_t p = 0; p < pairs; ++p, row += 2 * b.row)
        interleave(row, 2 * p + 1 < k ? row + b.row : nullptr, width, out + p * NR);
      continue;
    }
    const uint16_t* column = b.data + from * b.column;
    const int64_t whole_n = width / LANES * LANES, whole_p = k / 2 / LANES * LANES;
    for (int64_t i = 0; i < whole_n; i += LANES)
      for (int64_t p = 0; p < whole_p; p += LANES)
        transpose(column + i * b.column + 2 * p, b.column, out + p * NR + i);
    for (int64_t i = 0; i < width; ++i) {
      const uint16_t* x = column + i * b.column;
      for (int64_t p = i < whole_n ? whole_p : 0; p < pairs; ++p)
        out[p * NR + i] = pair(x[2 * p], 2 * p + 1 < k ? x[2 * p + 1] : 0);
    }
  }
}

// Rows [0, m) of a [m, k] as groups of MR: out[group][k / 2][MR].
void pack_a(Matrix a, int64_t m, int64_t k, uint32_t* out) {
  const int64_t pairs = blocks(k, 2), groups = blocks(m, MR);
  if (a.column == 1) {
    for (int64_t i = 0; i < groups * MR; ++i) {
      uint32_t* to = out + i / MR * pairs * MR + i % MR;
      const uint16_t* x = a.data + i * a.row;
      for (int64_t p = 0; p < pairs; ++p)
        to[p * MR] = i >= m ? 0 : pair(x[2 * p], 2 * p + 1 < k ? x[2 * p + 1] : 0);
    }
    return;
  }
  uint32_t line[MC] = {};
  for (int64_t p = 0; p < pairs; ++p) {
    const uint16_t* x = a.data + 2 * p * a.column;
    interleave(x, 2 * p + 1 < k ? x + a.column : nullptr, m, line);
    for (int64_t g = 0; g < groups; ++g)
      std::memcpy(out + (g * pairs + p) * MR, line + g * MR, MR * sizeof *out);
  }
}

// out [rows, width] (+)= MR rows of `a` times NR columns of `b`.
inline void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, float* out,
                     int64_t stride, int64_t rows, int64_t width, bool add) {
  constexpr int COLUMNS = NR / LANES;
  __m512 sums[MR][COLUMNS];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) sums[i][j] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, a += MR, b += NR) {
    __m512bh columns[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) columns[j] = (__m512bh)_mm512_load_si512(b + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32((int)a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], row, columns[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) {
      const int64_t left = width - j * LANES;
      if (left <= 0) break;
      const __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
      float* to = out + i * stride + j * LANES;
      __m512 sum = sums[i][j];
      if (add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum);
      _mm512_mask_storeu_ps(to, mask, sum);
    }
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint32_t, Free>;

Buffer buffer(int64_t count) {
  return Buffer((uint32_t*)std::aligned_alloc(64, blocks(count * 4, 64) * 64));
}

// Sides of a tile: whole groups, and where it can be so many tiles that threads finish together.
void tile_sides(int64_t M, int64_t N, int64_t& m, int64_t& n) {
  m = std::min(MC, blocks(M, MR) * MR), n = std::min(NC, blocks(N, NR) * NR);
  const int64_t threads = omp_get_max_threads();
  while (threads > 1 && blocks(M, m) * blocks(N, n) < 4 * threads) {
    const bool rows = m > LEAST_M && (m >= n || n <= LEAST_N);
    if (!rows && n <= LEAST_N) break;
    if (rows)
      m = std::max(LEAST_M, blocks(m / 2, MR) * MR);
    else
      n = std::max(LEAST_N, blocks(n / 2, NR) * NR);
  }
}

}  // namespace

void bf16(Matrix a, Matrix b, float* out, int64_t stride, int64_t M, int64_t N, int64_t K,
          bool add) {
  if (M == 0 || N == 0) return;
  int64_t m, n;
  tile_sides(M, N, m, n);
  const int64_t rows = blocks(M, m), tiles = rows * blocks(N, n);
#pragma omp parallel
  {
    Buffer packed_a = buffer(blocks(m, MR) * MR * KC / 2),
           packed_b = buffer(blocks(n, NR) * NR * KC / 2);
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t i0 = tile % rows * m, j0 = tile / rows * n;
      const int64_t height = std::min(m, M - i0), width = std::min(n, N - j0);
      for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += KC) {
        const int64_t k = std::min(KC, K - k0), pairs = blocks(k, 2);
        pack_a({a.data + i0 * a.row + k0 * a.column, a.row, a.column}, height, k, packed_a.get());
        pack_b({b.data + k0 * b.row + j0 * b.column, b.row, b.column}, k, width, packed_b.get());
        for (int64_t i = 0; i < height; i += MR)
          for (int64_t j = 0; j < width; j += NR)
            multiply(packed_a.get() + i * pairs, packed_b.get() + j * pairs, pairs,
                     out + (i0 + i) * stride + j0 + j, stride, height - i, width - j,
                     add || k0 > 0);
      }
    }
  }
}

}  // namespace dpo::products
