"""Losses of single judged completions, without a partner: `kto` and `apo_zero_unpaired`.

With r = log pi / pi_ref of a completion and s the logistic sigmoid (TRL's KTOTrainer):

                       desirable                     undesirable
    kto                w_D (1 - s(beta (r - z)))     w_U (1 - s(beta (z - r)))
    apo_zero_unpaired  w_D (1 - s(beta r))           w_U s(beta r)

and the mean over rows (arXiv 2402.01306, 2408.06266). `z` is one number, the same for all rows of
an optimizer step and without gradient: the mean of r over completions under prompts that are not
theirs, at least 0 (`kl_baseline`). It has to be known before the first backward of the step, summed
over all of its batches and ranks.

The log-probs come from the same ops as those of pairs; what is here is O(rows), in fp64.
Letters: `N` rows (sequences), `T` positions, `V` vocabulary, `H` hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import dpo, linear_dpo
from .inputs import checks
from .inputs.shards import GivenHead
from .loss.from_pairs import check_row_weights, ignored
from .loss_values import check_count
from .losses import UNPAIRED, has_baseline

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .parallel import VocabShards


class UnpairedOutput(NamedTuple):
    """`loss`: scalar ([N] with reduction="none"), differentiable; the rest detached.

    `logps` [N] of the policy, `rewards` [N] beta times the log-ratio, `kl` []: the z used (0 where
    the loss has none).
    """

    loss: Tensor
    logps: Tensor
    rewards: Tensor
    kl: Tensor


def kl_baseline(logps: Tensor, ref_logps: Tensor, count: float | Tensor | None = None) -> Tensor:
    """[] z of KTO: mean of logps - ref_logps [N] over mismatched completions, at least 0.

    `count`: divides the sum in place of N, where the sum over all batches is gathered elsewhere.
    """
    _row_values("logps", logps)
    _row_values("ref_logps", ref_logps, logps)
    check_count("count", count)
    total = (logps.detach().double() - ref_logps.detach().double()).sum()
    return (total / (logps.shape[0] if count is None else count)).clamp(min=0)


def unpaired_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    desirable: Tensor,
    *,
    z: float | Tensor | None = None,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
    reference_free: bool = False,
    reduction: str = "mean",
    num_rows: float | Tensor | None = None,
) -> UnpairedOutput:
    """The loss of completions whose log-probs are known.

    Args:
        logps: [N] the policy's log-probs (sums over the scored tokens).
        ref_logps: [N] the reference's; None with `reference_free=True` alone.
        desirable: [N] bool.
        z: what `kto` compares with, >= 0, without gradient: required by it, refused by the other.
        weights: [N] of the rows; they may want a gradient.
        num_rows: divides the sum of the rows' losses, in place of N (accumulation, ranks).

    Raises:
        ValueError, TypeError: a wrong argument, named.
    """
    _row_values("logps", logps)
    if (ref_logps is None) != reference_free:
        raise ValueError("give exactly one of ref_logps and reference_free=True")
    if ref_logps is not None:
        _row_values("ref_logps", ref_logps, logps)
    checks.is_tensor("desirable", desirable)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, got {desirable.dtype}")
    checks.shape("desirable", desirable, tuple(logps.shape), "that of logps")
    checks.same_device("desirable", desirable, "logps", logps)
    checks.choice("loss_type", loss_type, UNPAIRED)
    checks.choice("reduction", reduction, ("mean", "none"))
    checks.positive("beta", beta, "a positive finite number")
    for name, value in (
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
    ):
        checks.number(name, value)
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    checks.flag("reference_free", reference_free)
    check_count("num_rows", num_rows)
    base = _baseline(z, loss_type, logps)
    ratio = logps.double()
    if ref_logps is not None:
        ratio = ratio - ref_logps.detach().double()
    # 1 - s(x) = s(-x), and s(beta b) = 1 - s(beta (0 - b)): one form for both losses.
    signed = torch.where(desirable, -1.0, 1.0) * (beta * (ratio - base))
    # As fp64: `torch.where` of two numbers is fp32.
    scale = torch.where(
        desirable, ratio.new_full((), desirable_weight), ratio.new_full((), undesirable_weight)
    )
    # A row of weight 0 adds nothing, whatever its log-probs are.
    left_out = scale == 0
    if weights is not None:
        check_row_weights(weights, len(logps), "that of logps", logps)
        weights = weights.double()
        left_out = left_out | ignored(weights, signed)
        scale = scale * weights
    rows = scale * torch.sigmoid(signed.masked_fill(left_out, 0.0))
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    loss = (
        rows if reduction == "none" else rows.sum() / (len(rows) if num_rows is None else num_rows)
    )
    rewards = (beta * ratio).detach()
    return UnpairedOutput(
        loss.to(dtype), logps.detach().to(dtype), rewards.to(dtype), base.detach().to(dtype)
    )


def fused_unpaired_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None = None,
    *,
    desirable: Tensor,
    z: float | Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_logps_per_token: bool | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    inplace: bool = False,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    **loss_options: Any,
) -> UnpairedOutput:
    """As `fused_dpo_loss`, of N single completions: logits [N, T, V] or packed [rows, V].

    `desirable` [N] bool, `z` and `**loss_options` as `unpaired_loss` takes them.
    """
    logps, reference = dpo.both_scored(
        logits,
        labels,
        ref_logits,
        ref_logps,
        ref_logps_per_token=ref_logps_per_token,
        inplace=inplace,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        backend=backend,
    )
    return unpaired_loss(logps, reference, desirable, z=z, **loss_options)


def fused_linear_unpaired_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    desirable: Tensor,
    z: float | Tensor | None = None,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_logps_per_token: bool | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    vocab_group: ProcessGroup | VocabShards | None = None,
    **loss_options: Any,
) -> UnpairedOutput:
    """As `fused_linear_dpo_loss`, of N single completions: hidden [N, T, H] or packed [rows, H]."""
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias belong to ref_hidden, which was not given")
    logps, reference = linear_dpo.both_scored(
        GivenHead(hidden, weight, bias),
        GivenHead(ref_hidden, ref_weight, ref_bias),
        labels,
        ref_logps,
        ref_logps_per_token=ref_logps_per_token,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        temperature=temperature,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        backend=backend,
        vocab_group=vocab_group,
    )
    return unpaired_loss(logps, reference, desirable, z=z, **loss_options)


def _baseline(z: float | Tensor | None, loss_type: str, like: Tensor) -> Tensor:
    if not has_baseline(loss_type):
        if z is not None:
            raise ValueError(f"z has no meaning for {loss_type!r}")
        return torch.zeros((), dtype=torch.float64, device=like.device)
    if z is None:
        raise ValueError(
            f"{loss_type} needs z: the mean log-ratio of mismatched completions (kl_baseline)"
        )
    if not isinstance(z, Tensor):
        checks.number("z", z)
        if z < 0:
            raise ValueError(f"z must be at least 0, got {z}")
        return torch.full((), float(z), dtype=torch.float64, device=like.device)
    checks.floating("z", z)
    checks.shape("z", z, (), "one number")
    checks.values("z", z, lambda x: x >= 0, "at least 0")
    return z.detach().double().to(like.device)


def _row_values(name: str, value: Tensor, like: Tensor | None = None) -> None:
    checks.floating(name, value)
    if like is not None:
        checks.shape(name, value, tuple(like.shape), "that of logps")
        checks.same_device(name, value, "logps", like)
    elif value.dim() != 1 or not value.shape[0]:
        raise ValueError(f"{name} must have shape [N], N at least 1, got {list(value.shape)}")
