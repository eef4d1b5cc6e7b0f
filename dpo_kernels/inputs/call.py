"""What a call settles at the door: one frozen object, which all that follows trusts.

A front function hands over its arguments; here they are checked, and what follows from them is
settled: the loss with its terms, the layout, the logit transform, the backend, the reference's
log-probs (hidden states, strategy and plan: `linear_call.py`). Tensors that may want a gradient
stand beside the call, so that it keeps none of them alive.

Options are the same step after step. What depends on them alone is kept by their values
(`settle`); a tensor among them, or an option that is wrong, is looked at each time.

Letters: `B` pairs, `S` sequences, `R` rows, `T` positions, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import losses as _losses
from ..backends import FUSED_DTYPES, choose
from ..loss.from_pairs import MAY_BE_TENSORS, check_pair_options
from ..loss.ordinary import Ordinary
from ..ops import budget_of, check_rows, check_stats, joint_dtype
from ..ops.direct import eager
from . import arguments, checks
from .layout import Layout, Scored
from .transform import LogitTransform

_SIMPLE = {bool, int, float, str, type(None)}
_LARGEST = 256
_TRANSFORM = {"temperature": 1.0, "logit_softcap": None, "logit_scale": 1.0}


@dataclass(frozen=True)
class Settled:
    """The arguments that are no tensors of the batch, checked, and what the loss needs by them."""

    options: _losses.LossOptions
    losses: list[tuple[_losses.Loss, float, _losses.Terms]]
    transform: LogitTransform
    asked: tuple[str, ...]  # the statistics that `DPOOutput.stats` gives
    budget: int
    ordinary: Ordinary | None  # the loss in closed form, if it has one
    stats: tuple[str, ...]  # the statistics to compute: those asked for, and WPO's
    op: str  # that reads the logits, as `backends.choose` knows it
    uses_reference: bool
    separable: bool  # a sum over pairs: a pair's gradient needs that pair alone
    tensors: bool  # whether an option is one
    tail: float  # what a scored token past the shorter completion of its pair weighs (LD-DPO)

    @property
    def needs_kl(self) -> bool:
        return self.op == "token_kl"


_kept: dict[tuple, Settled] = {}


def settle(given: dict[str, Any], loss_options: dict[str, Any]) -> Settled:
    """`given` are arguments of `arguments.CHECKS` and those of the logit transform.

    Raises `TypeError` or `ValueError` for a wrong one.
    """
    key = None if torch.compiler.is_compiling() else _key(given, loss_options)
    if key is not None and key in _kept:
        return _kept[key]
    transform: dict[str, Any] = {n: given.get(n, default) for n, default in _TRANSFORM.items()}
    arguments.check(**{name: x for name, x in given.items() if name not in transform})
    o, losses = _losses.resolve(loss_options)
    rows, asked = [row for row, _, _ in losses], check_stats(given.get("stats", ()))
    own = o.use_weighting and "log_sum_sq_probs" not in asked
    coupled = any(row.batch_coupled for row in rows)
    # WPO weighs a loss that is the NLL alone by its mean over the batch.
    coupled |= o.use_weighting and any(not terms for _, _, terms in losses)
    settled = Settled(
        options=o,
        losses=losses,
        transform=LogitTransform.of(**transform),
        asked=asked,
        budget=budget_of(given.get("memory_budget")),
        ordinary=Ordinary.of(o, losses),
        stats=(*asked, "log_sum_sq_probs") if own else asked,
        op="token_kl" if any(row.needs_kl for row in rows) else "token_logps",
        uses_reference=any(row.takes_reference for row in rows),
        separable=o.reduction == "mean" and not coupled,
        tensors=any(isinstance(getattr(o, name), Tensor) for name in MAY_BE_TENSORS),
        tail=1.0 if o.ld_alpha is None else float(o.ld_alpha),
    )
    if key is not None:
        if len(_kept) >= _LARGEST:
            _kept.clear()
        _kept[key] = settled
    return settled


def _key(*groups: dict[str, Any]) -> tuple | None:
    """Equal for arguments that are equal in value and type; None where they say nothing of it."""
    parts: list[Any] = []
    for group in groups:
        for name, x in group.items():
            kind = type(x)
            if kind is list or kind is tuple:
                if any(type(item) not in _SIMPLE for item in x):
                    return None
                parts += (name, kind, *(type(item) for item in x), *x)
            elif kind in _SIMPLE:
                parts += (name, kind, x)
            else:
                return None
        parts.append(None)
    return tuple(parts)


@dataclass(frozen=True)
class Call:
    """A call from log-probs of sequences."""

    settled: Settled
    backend: str
    dtype: torch.dtype  # of what is returned
    direct: bool = False  # one autograd function over the backend's functions gives the loss


@dataclass(frozen=True, kw_only=True)
class TokenCall(Call):
    """A call from logits, or from hidden states."""

    layout: Layout
    reference: Tensor | None = None  # its log-probs, detached: sums [S], or a row [R, T]
    ref_logits: Tensor | None = None  # [R, T, V], detached
    ref_backend: str = ""
    inplace: bool = False

    @property
    def place(self) -> tuple[Tensor, Tensor | None, int]:
        return self.layout.targets, self.layout.cu_seqlens, self.layout.ignore_index


def of_logits(
    given: dict[str, Any],
    loss_options: dict[str, Any],
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[TokenCall, Tensor]:
    """The call of `fused_dpo_loss`, and its logits as rows [R, T, V]."""
    settled = settle(given, loss_options)
    layout = _layout(given, labels, cu_seqlens, logits)
    device, ref = logits.device, None
    backend = choose(given["backend"], device, logits.dtype, settled.op)
    x = layout.of_rows("logits", logits)
    if ref_logits is not None:
        ref = layout.rows("ref_logits", ref_logits, "V").detach()
        checks.shape("ref_logits", ref_logits, tuple(logits.shape), "that of logits")
    per_token = given["ref_logps_per_token"]
    check_reference(settled, layout, ref is not None, "ref_logits", ref_logps, per_token)
    if given["drop_common_prefix"]:
        layout = without_common_prefix(settled, layout, ref_logps, per_token, x)
    if not settled.uses_reference:
        ref = ref_logps = None
    reference = reference_of(layout, ref_logps, per_token)
    ref_backend = backend
    if ref is not None:
        if settled.needs_kl:  # one op reads both
            backend = choose(given["backend"], device, joint_dtype(x, ref), settled.op)
        else:
            ref_backend = choose(given["backend"], device, ref.dtype)
            check_rows(ref, ref_backend)
    joint = ref if settled.needs_kl else None
    inplace = check_rows(x, backend, given["inplace"], joint)
    direct = (
        settled.ordinary is not None
        and backend != "torch"
        and x.dtype in FUSED_DTYPES
        and (ref is None or ref.dtype in FUSED_DTYPES)
        and eager(x, ref, reference, layout.targets, layout.cu_seqlens)
    )
    call = TokenCall(
        settled,
        backend,
        wide_dtype(logits),
        direct,
        layout=layout,
        reference=reference,
        ref_logits=ref,
        ref_backend=ref_backend,
        inplace=inplace,
    )
    return call, x


def of_scored_logits(
    given: dict[str, Any], logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None
) -> tuple[TokenCall, Tensor]:
    """The call of `sequence_logps`, and its logits as rows [R, T, V]."""
    settled = settle(given, {})
    layout = _layout(given, labels, cu_seqlens, logits)
    x = layout.of_rows("logits", logits)
    backend = choose(given["backend"], x.device, x.dtype)
    inplace = check_rows(x, backend, given["inplace"])
    return TokenCall(settled, backend, wide_dtype(x), layout=layout, inplace=inplace), x


def _layout(given: dict[str, Any], labels: Tensor, cu_seqlens: Tensor | None, x: Tensor) -> Layout:
    if not checks.floating("logits", x).dim():
        raise ValueError("logits must have shape [rows, T, V] or [N, V], got []")
    return Layout.of(
        labels,
        cu_seqlens,
        shift=given["shift"],
        ignore_index=given["ignore_index"],
        V=x.shape[-1],
        scored=Scored("logits", x, "V"),
    )


def check_reference(
    settled: Settled,
    layout: Layout,
    given: bool,
    name: str,
    ref_logps: Tensor | None,
    per_token: bool | None,
) -> None:
    """Pairs, and the reference that the losses need: as `name`, if `given`, or log-probs."""
    S, o = layout.sequences, settled.options
    if S % 2:
        raise ValueError(f"a batch of pairs is [chosen; rejected], an even number of rows, got {S}")
    if settled.tensors or not S:
        check_pair_options(o, S // 2, layout.targets)
    if given and ref_logps is not None:
        raise ValueError(f"give {name} or ref_logps, not both")
    for row, _, _ in settled.losses:
        if row.needs_kl and not given:
            came = "nothing" if ref_logps is None else "ref_logps"
            raise ValueError(
                f"{row.name!r} compares the distributions of policy and reference over the "
                f"whole vocabulary: it needs {name}, got {came}"
            )
    if o.reference_free:
        if given or ref_logps is not None:
            came = name if given else "ref_logps"
            raise ValueError(f"reference_free=True, but {came} was given")
    elif not given and ref_logps is None:
        for row, _, _ in settled.losses:
            if row.reference:
                raise ValueError(
                    f"{row.name!r} needs a reference: give {name}, ref_logps or reference_free=True"
                )
    if ref_logps is not None:
        check_given_logps(layout, ref_logps, per_token)


def check_given_logps(layout: Layout, ref_logps: Tensor, per_token: bool | None) -> None:
    """A reference's log-probs: sums of sequences or values a token, and it is clear which."""
    checks.floating("ref_logps", ref_logps)
    checks.same_device("ref_logps", ref_logps, "labels", layout.targets)
    sums, rows, shape = (layout.sequences,), layout.shape, tuple(ref_logps.shape)
    if (shape != sums or per_token) and (shape != rows or per_token is False):
        kinds = {False: f"{list(sums)} (sequence sums)", True: f"{list(rows)} (one a token)"}
        told = kinds.values() if per_token is None else [kinds[per_token]]
        why = "" if per_token is None else f" with ref_logps_per_token={per_token}"
        raise ValueError(f"ref_logps must have shape {' or '.join(told)}{why}, got {list(shape)}")
    if per_token is None and sums == rows:
        raise ValueError(
            f"ref_logps {list(sums)} may be sequence sums or one value a token, of which there "
            "are as many here: say ref_logps_per_token=False or True"
        )


def _is_sums(layout: Layout, ref_logps: Tensor, per_token: bool | None) -> bool:
    if per_token is not None:
        return not per_token
    return tuple(ref_logps.shape) == (layout.sequences,)


def reference_of(layout: Layout, ref_logps: Tensor | None, per_token: bool | None) -> Tensor | None:
    """Sums [S], or values a row [R, T], of log-probs as the user gave them; detached."""
    if ref_logps is None:
        return None
    if ref_logps.requires_grad:
        ref_logps = ref_logps.detach()
    if _is_sums(layout, ref_logps, per_token):
        return ref_logps
    return layout.from_per_token("ref_logps", ref_logps)


def without_common_prefix(
    settled: Settled,
    layout: Layout,
    ref_logps: Tensor | None,
    per_token: bool | None,
    states: Tensor,
) -> Layout:
    """The layout in which the tokens that both completions start with are not scored."""
    o = settled.options
    for row, _, terms in settled.losses:
        if not row.cancels_common_tokens(terms, o):
            raise ValueError(
                "drop_common_prefix needs a loss of the difference of the log-ratios alone; "
                f"{row.name!r} is not one with these options"
            )
    options = {
        "ld_alpha": o.ld_alpha is not None,
        "use_weighting": o.use_weighting,
        "sft_weight": o.sft_weight != 0,
        "f_divergence_type": o.f_divergence_type != "reverse_kl",
    }
    for name, given in options.items():
        if given:
            raise ValueError(
                f"drop_common_prefix: with {name}={getattr(o, name)!r} common tokens do not cancel"
            )
    if ref_logps is not None and _is_sums(layout, ref_logps, per_token):
        raise ValueError(
            "drop_common_prefix needs ref_logps per token (the shape of reduction='none'), got "
            "sums, which contain the tokens that are dropped"
        )
    return layout.without_common_prefix(states)


def of_pairs(
    backend: str | None, loss_options: dict[str, Any], values: dict[str, Tensor | None]
) -> Call:
    """The call of `preference_loss`: `values` are its tensors by name, policy first."""
    settled = settle({"backend": backend}, loss_options)
    o, rows = settled.options, settled.losses
    by_token = {"ld_alpha": o.ld_alpha is not None, "use_weighting": o.use_weighting}
    for option, wanted in by_token.items():
        if wanted:
            raise ValueError(f"{option} needs per-token log-probs; use fused_dpo_loss")
    for row, _, _ in rows:
        if row.needs_kl:
            raise ValueError(
                f"{row.name!r} needs the KL of reference and policy at each token; use "
                "fused_dpo_loss with ref_logits or fused_linear_dpo_loss with ref_hidden"
            )
    chosen, rejected, ref_chosen, ref_rejected, *lengths = values.values()
    chosen = checks.floating("chosen_logps", chosen)
    if chosen.dim() != 1:
        raise ValueError(f"chosen_logps must have shape [B], got {list(chosen.shape)}")
    shape = tuple(chosen.shape)
    for name, value in values.items():
        if value is None and name not in ("chosen_logps", "rejected_logps"):
            continue
        tensor = checks.is_tensor(name, value)
        if "lengths" in name:
            checks.counts(name, tensor)
        else:
            checks.floating(name, tensor)
        checks.shape(name, tensor, shape, "that of chosen_logps")
        checks.same_device(name, tensor, "chosen_logps", chosen)
    check_pair_options(o, shape[0], chosen)
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("ref_chosen_logps and ref_rejected_logps come together, got one of them")
    if o.reference_free and ref_chosen is not None:
        raise ValueError("reference_free=True, but ref_chosen_logps was given")
    for row, _, terms in rows:
        if terms and row.by_length and any(x is None for x in lengths):
            raise ValueError(f"{row.name!r} needs chosen_lengths and rejected_lengths, got None")
    nll = o.sft_weight or any(row.sft is not None for row, _, _ in rows)
    if nll and lengths[0] is None and o.num_chosen_tokens is None:
        raise ValueError("an SFT term needs chosen_lengths, got None")
    assert rejected is not None
    wide = torch.float64 in (chosen.dtype, rejected.dtype)
    name = choose(backend, chosen.device, torch.float32, "pair_loss")
    if wide and backend is None:
        name = "torch"
    constant = not any(
        x is not None and x.requires_grad for x in (ref_chosen, ref_rejected, *lengths)
    )
    direct = settled.ordinary is not None and name != "torch" and constant
    direct = direct and eager(*values.values())
    return Call(settled, name, torch.float64 if wide else torch.float32, direct)


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
