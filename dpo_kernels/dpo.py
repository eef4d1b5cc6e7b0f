"""The front functions over logits or log-probs; those over hidden states are in `linear_dpo.py`.

Each is a composition of ops: token log-probs -> sequence sums -> pair loss. The heavy op sees one
scalar a sequence from the loss, so any loss of `losses.TABLE` costs the same. Called eagerly with
an ordinary loss, the three and their backwards are one autograd function (`loss/at_once.py`).

Letters: `B` pairs, `T` positions, `N` rows of packed input, `V` vocabulary. A batch of pairs is
[chosen; rejected]: sequence i is chosen, sequence B + i its rejected partner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import listwise
from .inputs import checks
from .inputs.call import of_logits, of_pairs, of_scored_logits
from .loss import from_tokens
from .loss.at_once import from_sums
from .loss.from_pairs import DPOOutput, Pairs, loss_of
from .losses import is_listwise


def fused_dpo_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    ref_logps_per_token: bool | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    drop_common_prefix: bool = False,
    inplace: bool = False,
    stats: tuple[str, ...] = (),
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    **loss_options: Any,
) -> DPOOutput:
    """DPO loss of a batch of pairs from the policy's logits.

    L = -log sigmoid(beta [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)])  (arXiv 2305.18290)
    or any other loss of `losses.TABLE` by `loss_type`; `loss_type="plackett_luce"` with
    `num_completions=K` ranks K completions of a prompt, sequence k B + i that of rank k.

    Args:
        logits: [2B, T, V] or packed [N, V]; fp32, bf16, fp16 (fp64 on the torch backend); unit
            stride in V, other strides free: views such as `logits[:, :-1]` are not copied.
        labels: [2B, T] or packed [N] int64, aligned with the input ids; `ignore_index` (prompt,
            padding) is not scored, and those rows are neither read nor computed.
        ref_logits: like `logits`, scored without gradient; or
        ref_logps: the reference's log-probs: sequence sums [2B], or per token in the shape that
            `sequence_logps(reduction="none")` gives. Exactly one of the two, or
            `reference_free=True`; losses without a reference (`simpo`, `orpo`, `cpo`, `alphapo`,
            `slic`) ignore it. `tdpo1` and `tdpo2` compare whole distributions: they need
            `ref_logits`, which are read beside `logits` in one pass.
        ref_logps_per_token: which of the two `ref_logps` is; None: its shape says. It does not for
            packed input of as many rows as sequences, which is refused with None.
        cu_seqlens: [2B + 1] int32 or int64 boundaries, for packed input.
        shift: `logits[:, t]` scores `labels[:, t + 1]` (True, Hugging Face) or `labels[:, t]`.
        drop_common_prefix: leave out the tokens that the two completions of a pair share at their
            start (same prompt, same tokens: the same distribution twice; a pair whose first logits
            or states show that the prompts differ stays whole). Loss, gradients and margins stay
            as they are, since those tokens cancel in the difference of the log-ratios; the
            log-probs and rewards returned are without them. `ValueError` for a loss or option in
            which they do not cancel.
        inplace: the backward writes the gradient over `logits` (no [2B, T, V] allocation). Another
            consumer of `logits` that runs its backward later raises. Under torch.compile, which
            owns the buffers, it is ignored.
        stats: statistics of the policy's tokens, as `sequence_logps` names them, in
            `DPOOutput.stats`.
        temperature, logit_softcap, logit_scale: z = softcap(logit_scale * x) / temperature, with
            softcap(x) = cap * tanh(x / cap); policy and reference alike.
        backend: "cuda", "triton", "cpu" or "torch"; None picks by device.
        **loss_options: `losses.LossOptions`.

    Returns:
        `DPOOutput`; `loss` is a scalar or [B] with `reduction="none"`.

    Raises:
        ValueError, TypeError: a wrong argument, named, before any kernel runs.
    """
    given = {
        "shift": shift,
        "ignore_index": ignore_index,
        "drop_common_prefix": drop_common_prefix,
        "inplace": inplace,
        "stats": stats,
        "ref_logps_per_token": ref_logps_per_token,
        "backend": backend,
        "temperature": temperature,
        "logit_softcap": logit_softcap,
        "logit_scale": logit_scale,
    }
    if is_listwise(loss_options):
        how = listwise.scoring(given)
        scored = both_scored(logits, labels, ref_logits, ref_logps, cu_seqlens=cu_seqlens, **how)
        return listwise.from_scored(*scored, stats, loss_options)
    call, x = of_logits(given, loss_options, logits, labels, ref_logits, ref_logps, cu_seqlens)
    return from_tokens.of_logits(call, x)


def both_scored(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    ref_logps: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    ref_logps_per_token: bool | None = None,
    stats: tuple[str, ...] = (),
    inplace: bool = False,
    **how: Any,
) -> tuple[Any, Tensor | None]:
    """For losses of no pairs: `sequence_logps` of the policy, and sums [sequences] of the reference
    as it is given."""
    from_tokens.check_one_reference(ref_logps, ref_logits is not None, "ref_logits")
    given = {"reduction": "sum", "stats": stats, "inplace": inplace, **how}
    call, x = of_scored_logits(given, logits, labels, cu_seqlens)
    reference = from_tokens.given_sums(call, ref_logps, ref_logps_per_token)
    found = from_tokens.reduce(call, from_tokens.score(call, x, call.settled.stats), "sum")
    if ref_logits is not None:
        checks.shape("ref_logits", ref_logits, tuple(logits.shape), "that of logits")
        with torch.no_grad():
            reference = sequence_logps(ref_logits, labels, cu_seqlens=cu_seqlens, **how)
    return found, reference


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: str = "sum",
    stats: tuple[str, ...] = (),
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    inplace: bool = False,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> Any:
    """Log-probs of the scored tokens of each sequence, from logits.

    Args:
        logits, labels, cu_seqlens, shift, ignore_index, inplace, temperature, logit_softcap,
            logit_scale, backend: as `fused_dpo_loss`, for any number of sequences.
        reduction: "sum" or "mean" (over scored tokens; 0 where there is none): [sequences];
            "none": [sequences, T - 1] (shift) or [sequences, T], packed [N]; 0 where ignored.
        stats: any of "entropy" (nats), "mean_logits", "is_top1" (1.0 or 0.0; the lowest index of
            the maximum), "log_sum_sq_probs" (log sum_v p_v^2), of z, without gradient.

    Returns:
        The log-probs (fp32; fp64 for fp64 logits), or with stats (log-probs, {name: tensor}), each
        in the shape of reduction="none".
    """
    given = {
        "shift": shift,
        "ignore_index": ignore_index,
        "inplace": inplace,
        "reduction": reduction,
        "stats": stats,
        "backend": backend,
        "temperature": temperature,
        "logit_softcap": logit_softcap,
        "logit_scale": logit_scale,
    }
    call, x = of_scored_logits(given, logits, labels, cu_seqlens)
    return from_tokens.reduce(call, from_tokens.score(call, x, call.settled.stats), reduction)


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    backend: str | None = None,
    **loss_options: Any,
) -> DPOOutput:
    """The loss of pairs whose sequence log-probs are known.

    Args:
        chosen_logps, rejected_logps: [B] policy log-probs (sums over the scored tokens).
        ref_chosen_logps, ref_rejected_logps: [B] the reference's; both None: reference-free.
        chosen_lengths, rejected_lengths: [B] scored-token counts, for the losses that normalise by
            length (`ipo`, `sigmoid_norm`, `simpo`, `alphapo`, `orpo`, `rdpo`) and for SFT terms.
        **loss_options: `losses.LossOptions`; `ld_alpha` and `use_weighting` need tokens: use
            `fused_dpo_loss`.

    Raises:
        ValueError, TypeError: a wrong argument, named.
    """
    values = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    call = of_pairs(backend, loss_options, values)
    s = call.settled
    if call.direct:
        assert s.ordinary is not None
        row = s.ordinary.row
        return from_sums(
            call,
            torch.cat([chosen_logps, rejected_logps]).double(),
            _both(ref_chosen_logps, ref_rejected_logps) if row.reference else None,
            _both(chosen_lengths, rejected_lengths) if row.by_length else None,
        )
    chosen, rejected, ref_chosen, ref_rejected = (
        None if x is None else x.double() for x in list(values.values())[:4]
    )
    assert chosen is not None and rejected is not None
    lengths = (chosen_lengths, rejected_lengths)
    pairs = Pairs(chosen, rejected, ref_chosen, ref_rejected, *lengths, -chosen, None)
    return loss_of(pairs, s.options, s.losses, call.dtype, call.backend)


def _both(chosen: Tensor | None, rejected: Tensor | None) -> Tensor | None:
    """[2B] of [B] and [B]."""
    return None if chosen is None or rejected is None else torch.cat([chosen, rejected])
