// What the CPU alone has functions of: ordinary losses (dpo_kernels/loss/ordinary.py) from logits to
// metrics, and the places of scored rows. Letters: N scored rows, B pairs, S = 2B sequences, chosen
// then rejected, K terms. Null where there is none.
#pragma once

#include "../ordinary.h"
#include "../params.h"

namespace dpo {

// Of log-probs [S]; counts [S] of their tokens are read if `per_token`.
void ordinary(const Ordinary&, const double* sums, const double* counts);
// Of logits: `rows`, whose log-probs are kept no longer, their sums at `place`, then the loss.
void ordinary_rows(const Ordinary&, TokenLogps rows, SequenceSum place);
// The gradient of those logits: slopes [S] times `scale`, then `place` and `rows` backwards.
void ordinary_rows_backward(const double* slopes, double scale, TokenLogpsBackward rows,
                            SequenceSum place);

// Of logits the loss and the fields, and over the logits their gradient.
void ordinary_streamed(Ordinary, const TokenLogps& rows, const SequenceSum& place, double divisor,
                       bool wide, void* loss, void* fields);
// The loss, the sum of those found over `divisor`, and the six fields after it, fp64 or fp32.
void ordinary_fields(const double* found, int64_t B, double divisor, bool wide, void* loss,
                     void* fields);

// Of labels [S, T] the scored targets of each sequence [S], and with `shift` the targets [S, T],
// each the next label; false where a label is neither `ignore_index` nor in [0, V).
bool targets_of(const int64_t* labels, int64_t S, int64_t T, int64_t V, int64_t ignore_index,
                bool shift, int64_t* targets, int64_t* lengths);
// Flat places [whole] of the N scored rows, after the last the first again; behind them the
// boundaries [S + 1] of the sequences among them, and their targets [N].
void packed(const SequenceSum& place, int64_t N, int64_t whole, int64_t* places);
// Rows of `size` bytes: the n at these places; and back among zeros, `all` rows. `places` rise.
void rows_at(const int64_t* places, int64_t n, const char* from, int64_t size, char* rows);
void rows_back(const int64_t* places, int64_t n, const char* rows, int64_t size, int64_t all,
               char* out);

}  // namespace dpo
