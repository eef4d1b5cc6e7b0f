"""The front functions over logits or log-probs; those over hidden states are in `linear_dpo.py`.

Each is a composition of ops: token log-probs -> sequence sums -> pair loss. The heavy op sees one
scalar a sequence from the loss, so any loss of `losses.TABLE` costs the same. Called eagerly with
an ordinary loss, the three and their backwards are one autograd function (`loss/ordinary.py`).

Letters: `B` pairs, `T` positions, `N` rows of packed input, `V` vocabulary. A batch of pairs is
[chosen; rejected]: sequence i is chosen, sequence B + i its rejected partner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import listwise, ops
from .backends import choose, load
from .inputs import checks
from .inputs.call import settle
from .inputs.layout import Layout, Scored
from .listwise import is_listwise
from .loss.from_pairs import DPOOutput, Pairs, check_pair_options, loss_of
from .loss.from_tokens import TokenLoss, last_size, op_of, reduce, wide_dtype
from .loss.ordinary import SumsCall, from_sums
from .ops import TokenLogps
from .ops.direct import eager


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
    if is_listwise(loss_options):
        listwise.refuse_prefix(drop_common_prefix)
        how: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "shift": shift,
            "ignore_index": ignore_index,
            "temperature": temperature,
            "logit_softcap": logit_softcap,
            "logit_scale": logit_scale,
            "backend": backend,
        }
        reference = listwise.reference_sums(ref_logps, ref_logits is not None, "ref_logits")
        found = sequence_logps(logits, labels, inplace=inplace, stats=stats, **how)
        if ref_logits is not None:
            checks.shape("ref_logits", ref_logits, tuple(logits.shape), "that of logits")
            with torch.no_grad():
                reference = sequence_logps(ref_logits, labels, **how)
        return listwise.from_scored(found, stats, reference, loss_options)
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
    settled = settle(given, loss_options)
    transform = settled.transform
    V, of = last_size("logits", logits), Scored("logits", logits, "V")
    layout = Layout.of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index, V=V, scored=of)
    name = choose(backend, logits.device, logits.dtype, op_of(settled.losses))
    run = TokenLoss.of(settled, layout, name, wide_dtype(logits), ref_logps_per_token)
    x, ref = layout.rows("logits", logits, "V"), None
    if ref_logits is not None:
        ref = layout.rows("ref_logits", ref_logits, "V")
        checks.shape("ref_logits", ref_logits, tuple(logits.shape), "that of logits")
    run.check(ref_logits is not None, "ref_logits", ref_logps)
    if drop_common_prefix:
        run = run.without_common_prefix(ref_logps, x)
        layout = run.layout
    if ref is not None and not run.uses_reference:
        ref = None
    if run.is_direct(x, ref, ref_logps):
        return run.finish_logits(x, ref, ref_logps, transform, inplace)

    def score(x: Tensor, stats: tuple[str, ...], inplace: bool) -> TokenLogps:
        return ops.token_logps(
            x,
            layout.targets,
            ignore_index=ignore_index,
            transform=transform,
            stats=stats,
            inplace=inplace,
            backend=backend,
        )

    if run.needs_kl:
        assert ref is not None
        joint = ops.token_kl(
            x,
            ref,
            layout.targets,
            ignore_index=ignore_index,
            transform=transform,
            stats=run.stats,
            inplace=inplace,
            backend=backend,
        )
        return run.finish(joint.policy, joint.ref_logps, None, joint.kl)
    reference = None
    if ref is not None:
        with torch.no_grad():
            reference = score(ref, (), False).logps
    return run.finish(score(x, run.stats, inplace), reference, ref_logps)


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
    settled = settle(given, {})
    V, of = last_size("logits", logits), Scored("logits", logits, "V")
    layout = Layout.of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index, V=V, scored=of)
    tokens = ops.token_logps(
        layout.rows("logits", logits, "V"),
        layout.targets,
        ignore_index=ignore_index,
        transform=settled.transform,
        stats=settled.stats,
        inplace=inplace,
        backend=backend,
    )
    return reduce(layout, tokens, reduction, backend)


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
    settled = settle({"backend": backend}, loss_options)
    options, rows = settled.options, settled.losses
    by_token = {"ld_alpha": options.ld_alpha is not None, "use_weighting": options.use_weighting}
    for option, wanted in by_token.items():
        if wanted:
            raise ValueError(f"{option} needs per-token log-probs; use fused_dpo_loss")
    for row, _, _ in rows:
        if row.needs_kl:
            raise ValueError(
                f"{row.name!r} needs the KL of reference and policy at each token; use "
                "fused_dpo_loss with ref_logits or fused_linear_dpo_loss with ref_hidden"
            )
    names = (
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "chosen_lengths",
        "rejected_lengths",
    )
    values = (
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
    )
    checks.floating("chosen_logps", chosen_logps)
    if chosen_logps.dim() != 1:
        raise ValueError(f"chosen_logps must have shape [B], got {list(chosen_logps.shape)}")
    shape = tuple(chosen_logps.shape)
    for name, value in zip(names, values, strict=True):
        if value is None and name not in ("chosen_logps", "rejected_logps"):
            continue
        tensor = checks.is_tensor(name, value)
        if "lengths" in name:
            checks.counts(name, tensor)
        else:
            checks.floating(name, tensor)
        checks.shape(name, tensor, shape, "that of chosen_logps")
        checks.same_device(name, tensor, "chosen_logps", chosen_logps)
    check_pair_options(options, shape[0], chosen_logps)
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps and ref_rejected_logps come together, got one of them")
    if options.reference_free and ref_chosen_logps is not None:
        raise ValueError("reference_free=True, but ref_chosen_logps was given")
    for row, _, terms in rows:
        if terms and row.by_length and (chosen_lengths is None or rejected_lengths is None):
            raise ValueError(f"{row.name!r} needs chosen_lengths and rejected_lengths, got None")
    nll = options.sft_weight or any(row.sft is not None for row, _, _ in rows)
    if nll and chosen_lengths is None and options.num_chosen_tokens is None:
        raise ValueError("an SFT term needs chosen_lengths, got None")

    name = choose(backend, chosen_logps.device, torch.float32, "pair_loss")
    wide_input = torch.float64 in (chosen_logps.dtype, rejected_logps.dtype)
    if wide_input and backend is None:
        name = "torch"
    dtype = torch.float64 if wide_input else torch.float32
    if (
        settled.ordinary is not None
        and name != "torch"
        and _constant(values[2:])
        and eager(*(x for x in values if x is not None))
    ):
        row = settled.ordinary.row
        call = SumsCall(
            settled.ordinary,
            rows,
            dtype,
            _both(values[2:4]) if row.reference else None,
            _both(values[4:]) if row.by_length else None,
            name,
            load(name),
        )
        return from_sums(call, torch.cat([chosen_logps, rejected_logps]).double())

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    chosen = chosen_logps.double()
    pairs = Pairs(
        chosen,
        rejected_logps.double(),
        wide(ref_chosen_logps),
        wide(ref_rejected_logps),
        chosen_lengths,
        rejected_lengths,
        -chosen,
        None,
    )
    return loss_of(pairs, options, rows, dtype, name)


def _constant(values: tuple[Tensor | None, ...]) -> bool:
    return not any(x is not None and x.requires_grad for x in values)


def _both(values: tuple[Tensor | None, ...]) -> Tensor | None:
    """[2B] of [B] and [B]."""
    chosen, rejected = values
    return None if chosen is None or rejected is None else torch.cat([chosen, rejected])
