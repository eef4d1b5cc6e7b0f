// What each op receives: one plain struct, raw pointers and 64-bit sizes. Letters: R rows of a
// padded batch (1 when packed), T positions, V vocabulary, S sequences, B pairs, K terms.
#pragma once

#include <cstdint>

namespace dpo {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// z = softcap(scale * x) * inv_temperature; softcap 0 means none.
struct Transform {
  double scale, softcap, inv_temperature;
};

struct TokenLogps {
  const void* logits;           // [R, T, V], unit stride in V
  int64_t stride_r, stride_t;   // in elements
  const int64_t* targets;       // [R, T] contiguous
  int64_t R, T, V, ignore_index;
  DType dtype;
  Transform transform;
  float* logps;                 // [R, T]
  double* lse;                  // [R, T]
  float* entropy;               // [R, T] or null, as the three below
  float* mean_logits;
  float* is_top1;
  float* log_sum_sq_probs;
};

struct TokenLogpsBackward {
  const float* grad;            // [R, T]
  const void* logits;           // [R, T, V]
  int64_t stride_r, stride_t;
  const int64_t* targets;       // [R, T] contiguous
  const double* lse;            // [R, T]
  int64_t R, T, V, ignore_index;
  DType dtype;                  // of the logits
  Transform transform;
  void* out;                    // [R, T, V], may be `logits`
  int64_t out_stride_r, out_stride_t;
  DType out_dtype;              // as dtype; in CUDA also bf16 or fp16 where that is fp32
};

// Log-probs of policy and reference, and KL(reference || policy), of each row. The reference may have
// a dtype and strides of its own.
struct TokenKl {
  const void* logits;  // [R, T, V], unit stride in V
  int64_t stride_r, stride_t;  // in elements
  const void* ref_logits;  // [R, T, V], unit stride in V
  int64_t ref_stride_r, ref_stride_t;
  const int64_t* targets;  // [R, T] contiguous
  int64_t R, T, V, ignore_index;
  DType dtype, ref_dtype;
  Transform transform;
  float* logps;  // [R, T], as the four below
  double* lse;
  float* ref_logps;
  double* ref_lse;
  float* kl;
};

struct TokenKlBackward {
  const float* grad_logps;  // [R, T]
  const float* grad_kl;  // [R, T]
  const void* logits;  // [R, T, V]
  int64_t stride_r, stride_t;
  const void* ref_logits;  // [R, T, V]
  int64_t ref_stride_r, ref_stride_t;
  const int64_t* targets;  // [R, T] contiguous
  const double* lse;  // [R, T]
  const double* ref_lse;  // [R, T]
  int64_t R, T, V, ignore_index;
  DType dtype, ref_dtype;
  Transform transform;
  void* out;  // [R, T, V] of dtype, may be `logits`, or `ref_logits` if of dtype
  int64_t out_stride_r, out_stride_t;
};

struct SequenceSum {
  const int64_t* targets;  // [R, T] contiguous, flat positions 0 .. R*T
  const int64_t* starts;  // [S + 1] first flat position of each sequence
  int64_t S, ignore_index;
  double tail_weight;
  const float* values;  // forward in: [R, T]
  double* sums;  // forward out: [S]
  int64_t* counts;  // forward out: [S]
  const double* grad;  // backward in: [S]
  float* d_values;  // backward out: [R, T], zeroed by the caller
};

// A term: w a b c c_beta c_inv_beta c_offset p scaled w_beta.
constexpr int TERM_NUMBERS = 10, MAX_TERMS = 3;

struct PairLoss {
  const double *u, *v, *beta;  // [B]
  const double* offset;  // [B] or null
  const int32_t* phis;  // [K]
  const double* terms;  // [K, TERM_NUMBERS]
  int64_t B, K;
  double* loss;  // [B]
  double* slopes;  // [4, B]: d/du d/dv d/dbeta d/doffset
};

struct Ordinary;  // ordinary.h

void token_logps(const TokenLogps&);
void token_logps_backward(const TokenLogpsBackward&);
void token_kl(const TokenKl&);
void token_kl_backward(const TokenKlBackward&);
void sequence_sum(const SequenceSum&);
void sequence_sum_backward(const SequenceSum&);
void pair_loss(const PairLoss&);

// The instruction sets of this build that this processor runs, best first, comma-separated.
const char* instruction_sets();
// Use the one named (for tests); false if it cannot run here. Empty: back to the best.
bool use_instruction_set(const char* name);

namespace cuda {

// Where a launch goes, and the memory that lives across launches on that stream.
struct Stream {
  int device;
  void* stream;  // cudaStream_t
};

// How many blocks share a row, given how many rows there are.
int token_logps_splits(int64_t rows, int64_t V, DType dtype, int device);
// Bytes that must be zero before the first launch (each launch leaves them zero), and bytes of
// scratch.
int64_t token_logps_counters(int64_t rows);
int64_t token_logps_scratch(int64_t rows, int splits);

// Each returns null, or what went wrong.
const char* token_logps(const TokenLogps&, int splits, void* counters, void* scratch, Stream);
const char* token_logps_backward(const TokenLogpsBackward&, Stream);
const char* sequence_sum(const SequenceSum&, int64_t rows, Stream);
// The gradient is `factor` times `grad`, and times what `scale` says of all sequences (`each` 0) or
// of each pair (1); a scale of 0 gives 0 whatever the gradient.
struct Scale {
  double factor = 1;
  const double* scale = nullptr;  // [1] or [S / 2], or null
  int64_t each = 0;
};
const char* sequence_sum_backward(const SequenceSum&, int64_t rows, const Scale&, Stream);
const char* pair_loss(const PairLoss&, Stream);
// As the CPU's (csrc/cpu/functions.h).
const char* ordinary(const Ordinary&, const double* sums, const double* counts, Stream);
const char* ordinary_fields(const double* found, int64_t B, double divisor, bool wide, void* loss,
                            void* fields, Stream);

}  // namespace cuda
}  // namespace dpo
