"""How many bytes a call takes at its peak, before it is made.

    estimate("streaming", lengths, T=1024, V=152064, H=896, dtype=torch.bfloat16).peak

counts what `fused_dpo_loss` and `fused_linear_dpo_loss` hold above their arguments, forward and
backward together, gradients included. The sizes of the linear head come from the same `Plan` that
the op allocates by, so the two cannot drift apart; `tests/test_memory.py` holds the sum to what a
process really takes. Not counted: what the caller's own graph keeps, and the allocator's rounding.

Letters: `B` pairs, `T` positions, `N` scored rows, `V` vocabulary, `H` hidden size, `r` rank of a
LoRA adapter, `C` rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .backends import FUSED_DTYPES
from .inputs import checks
from .ops import Plan, budget_of, chunks_of_pairs, plan_of
from .ops.products import low_rank_columns, products_of

FROM_LOGITS = ("in_place", "out_of_place")
LINEAR = ("streaming", "frozen", "recompute", "score")
# Targets, log-probs, log-sum-exp, indices and per-token gradients: int64, fp64 and fp32 a row.
_ROW = 64
_LARGEST_SIZE = 2**31 - 1


class Estimate(NamedTuple):
    """`peak` bytes above the arguments, and its `terms`, which are alive at once at the peak."""

    peak: int
    terms: dict[str, int]


def estimate(
    strategy: str,
    lengths: Sequence[int],
    *,
    T: int,
    V: int,
    H: int = 0,
    dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    trained: bool | None = None,
    low_rank: int = 0,
    ref_H: int = 0,
    kl: bool = False,
    batch_invariant: bool = False,
    device: str | torch.device = "cpu",
) -> Estimate:
    """Peak bytes of a call: its forward and, where the strategy has gradients, its backward.

    Args:
        strategy: from logits "in_place" or "out_of_place" (the gradient's place); of the linear
            head "streaming", "frozen", "recompute" or "score".
        lengths: [2B] scored tokens of each sequence, chosen 0..B-1, rejected 0..B-1.
        T: rows a sequence has with its prompt and padding (packed: the longest sequence's).
        V, H: vocabulary and hidden size (H for the linear head alone).
        dtype: of logits, or of hidden states and weight.
        memory_budget, batch_invariant: as in the call.
        trained: whether the head's weight wants a gradient; None: with "streaming" and
            "recompute" it does.
        low_rank: r of a LoRA adapter on the head, whose A and B are trained.
        ref_H: hidden size of a reference that is given as hidden states (H where it shares the
            policy's head); 0 for log-probs.
        kl: whether the loss needs the KL of reference and policy (`tdpo1`, `tdpo2`).
        device: where the call runs: the default of memory_budget and the products depend on it.

    Returns:
        `Estimate`; its terms, in bytes, are of

        rows            64 bytes a row: targets, log-probs, log-sum-exp, their gradients
        gradient        of the logits [2B, T, V], out of place
        logits          fp32 logits of a chunk [C, V], twice with `kl`
        slopes          their gradient as it is multiplied, [C, V] of `dtype`, where the device has
                        products of narrow operands (CUDA); what those need besides: `products`
        kept            fp32 logits kept for the backward ("recompute")
        hidden          a chunk's hidden states, as they are and in fp32, and their gradient [C, H]
        tile            rows of a narrow weight widened at once, for each head
        accumulators    fp32 gradients of the weight [V, H] and of the adapter's B [V, r]
        packed          fp32 gradient of the scored hidden states [N, H] ("streaming", "frozen":
                        twice with `kl`)
        d_hidden        the gradient handed over, [2B, T, H] of `dtype`
        d_weight        the gradient handed over where the weight is not fp32, [V, H] of `dtype`

        On a CUDA device torch's caching allocator rounds up.

    Raises:
        ValueError, TypeError: a wrong argument, named; a pair that "streaming" could not take.
    """
    checks.choice("strategy", strategy, (*FROM_LOGITS, *LINEAR))
    if dtype not in FUSED_DTYPES:
        raise ValueError(f"dtype must be fp32, bf16 or fp16, got {dtype}: fp64 has no such plan")
    sizes = {"T": T, "V": V, "H": H, "low_rank": low_rank, "ref_H": ref_H}
    for name, size in sizes.items():
        checks.whole(name, size, 1 if name in ("T", "V") else 0, _LARGEST_SIZE)
    for name, value in {"kl": kl, "batch_invariant": batch_invariant}.items():
        checks.flag(name, value)
    if trained is not None:
        checks.flag("trained", trained)
    budget = budget_of(memory_budget)
    lengths = _checked(lengths, T)
    S, N, size = len(lengths), sum(lengths), dtype.itemsize
    rows = {"rows": _ROW * S * T}
    if strategy in FROM_LOGITS:
        return _peak(rows | {"gradient": S * T * V * size if strategy == "out_of_place" else 0})
    if H <= 0:
        raise ValueError(f"H must be the hidden size for strategy={strategy!r}, got {H!r}")
    if kl and ref_H <= 0:
        raise ValueError(f"kl=True needs ref_H, the reference's hidden size, got {ref_H!r}")
    if trained is None:
        trained = strategy in ("streaming", "recompute")
    if trained and strategy in ("frozen", "score"):
        raise ValueError(f"strategy {strategy!r} has no gradient of the weight; got trained=True")
    joint_H = ref_H if strategy == "streaming" or kl else 0
    weight = torch.empty((V, H), dtype=dtype, device="meta")
    down = torch.empty((low_rank, H), device="meta") if low_rank else None
    place, B = torch.device(device), S // 2
    plan = plan_of(
        strategy,
        budget,
        N,
        weight,
        down,
        None,
        batch_invariant,
        joint_H,
        kl,
        largest=max(lengths[i] + lengths[B + i] for i in range(B)),
        device=place,
    )
    products = products_of(place, dtype)
    chunk = min(plan.chunk, N)
    if strategy == "streaming":
        chunk = max(_rows_of_chunks(lengths, plan))
    whole = -(-chunk // plan.block) * plan.block
    narrow = size != 4
    gradients = strategy != "score"
    # Kept logits are projected where they stay, and a gradient that is rounded is written beside.
    projected = plan.keep < N or not products.narrow or dtype != torch.bfloat16
    work = rows | {
        "logits": 4 * whole * plan.pitch * (2 if kl else 1) * projected,
        # The rows as they are gathered, as the products take them, and what d_hidden gives.
        "hidden": whole * (max(H, ref_H) * (size + 4) + (4 * H if gradients else 0) + 8 * low_rank),
        "tile": 4 * plan.tile * (H + joint_H) if narrow and not products.narrow else 0,
        "slopes": whole * plan.pitch * size if products.narrow and gradients else 0,
        "products": plan.scratch + 2 * V * low_rank_columns(low_rank, torch.float32, products),
    }
    stashes = {"streaming": 1, "frozen": 2 if kl else 1}.get(strategy, 0)
    held = {
        "packed": 4 * stashes * N * (H + low_rank),
        "kept": 4 * -(-plan.keep // plan.block) * plan.block * plan.pitch,
        "accumulators": 4 * V * ((H if trained else 0) + low_rank) if gradients else 0,
    }
    if strategy == "frozen":
        held["accumulators"] = 0
    over = {
        "d_hidden": S * T * H * size if gradients else 0,
        "d_weight": V * (H if trained else 0) * size if gradients and narrow else 0,
    }
    # "recompute" works on chunks again in the backward, beside the gradients it hands over; the
    # others are through with their chunks by then.
    if strategy == "recompute":
        return _peak(work | held | over)
    return max(_peak(work | held), _peak(rows | held | over), key=lambda e: e.peak)


def _checked(lengths: Sequence[int], T: int) -> list[int]:
    if not isinstance(lengths, Sequence) or isinstance(lengths, str):
        raise TypeError(f"lengths must be a list of integers, got {type(lengths).__name__}")
    lengths = [checks.whole(f"lengths[{i}]", n, 0) for i, n in enumerate(lengths)]
    if len(lengths) % 2 or not lengths or max(lengths) > T:
        raise ValueError(
            f"lengths must be [2B] counts from 0 to T={T}, got {checks.shown(lengths)}"
        )
    return lengths


def _rows_of_chunks(lengths: list[int], plan: Plan) -> list[int]:
    B = len(lengths) // 2
    pairs = [lengths[i] + lengths[B + i] for i in range(B)]
    if max(pairs) > plan.chunk:
        raise ValueError(
            f"'streaming' takes whole pairs: one has {max(pairs)} scored rows, more than the "
            f"{plan.chunk} that memory_budget allows"
        )
    return [sum(pairs[i:j]) for i, j in chunks_of_pairs(lengths, plan.chunk, plan.least)]


def _peak(terms: dict[str, int]) -> Estimate:
    terms = {name: n for name, n in terms.items() if n}
    return Estimate(sum(terms.values()), terms)
