"""One loss over the log-probs of tokens: what every front function ends with.

    token log-probs -> sequence sums -> pair loss

Policy and reference come as values a row; this module knows what the chosen losses need of them.
Letters: `B` pairs, `R` rows, `T` positions, `V` vocabulary, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import losses as _losses
from .. import ops
from ..backends import FUSED_DTYPES, choose, load
from ..inputs import checks
from ..inputs.call import Settled
from ..inputs.layout import Layout
from ..inputs.transform import LogitTransform
from ..ops import TokenLogps
from ..ops.direct import eager
from .from_pairs import DPOOutput, Pairs, check_pair_options, loss_of
from .ordinary import LogitsCall, Ordinary, SumsCall, from_logits, from_sums


@dataclass(frozen=True)
class TokenLoss:
    """One loss over token log-probs: what it needs of them, and the way to `DPOOutput`."""

    layout: Layout
    options: _losses.LossOptions
    losses: list
    backend: str
    dtype: torch.dtype
    per_token: bool | None = None  # what `ref_logps` is; None: its shape says
    asked: tuple[str, ...] = ()  # the statistics that `DPOOutput.stats` gives
    ordinary: Ordinary | None = None  # the loss in closed form, if it has one

    @staticmethod
    def of(
        settled: Settled,
        layout: Layout,
        backend: str,
        dtype: torch.dtype,
        per_token: bool | None = None,
    ) -> TokenLoss:
        return TokenLoss(
            layout,
            settled.options,
            settled.losses,
            backend,
            dtype,
            per_token,
            settled.stats,
            settled.ordinary,
        )

    @property
    def stats(self) -> tuple[str, ...]:
        """The statistics to compute: those asked for, and WPO's."""
        own = self.options.use_weighting and "log_sum_sq_probs" not in self.asked
        return (*self.asked, "log_sum_sq_probs") if own else self.asked

    def shown(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those asked for, of statistics a row [R, T], in the shape users see."""
        return {name: self.layout.per_token(stats[name]) for name in self.asked}

    @property
    def separable(self) -> bool:
        """Whether the loss is a sum over pairs, so that a pair's gradient needs that pair alone."""
        coupled = any(row.batch_coupled for row, _, _ in self.losses)
        # WPO weighs a loss that is the NLL alone by its mean over the batch.
        coupled |= self.options.use_weighting and any(not terms for _, _, terms in self.losses)
        return self.options.reduction == "mean" and not coupled

    @property
    def needs_kl(self) -> bool:
        return op_of(self.losses) == "token_kl"

    @property
    def uses_reference(self) -> bool:
        return any(row.takes_reference for row, _, _ in self.losses)

    def check(self, given: bool, name: str, ref_logps: Tensor | None) -> None:
        S = self.layout.sequences
        if S % 2:
            raise ValueError(
                f"a batch of pairs is [chosen; rejected], an even number of rows, got {S}"
            )
        check_pair_options(self.options, S // 2, self.layout.targets)
        if given and ref_logps is not None:
            raise ValueError(f"give {name} or ref_logps, not both")
        for row, _, _ in self.losses:
            if row.needs_kl and not given:
                came = "nothing" if ref_logps is None else "ref_logps"
                raise ValueError(
                    f"{row.name!r} compares the distributions of policy and reference over the "
                    f"whole vocabulary: it needs {name}, got {came}"
                )
        if self.options.reference_free:
            if given or ref_logps is not None:
                came = name if given else "ref_logps"
                raise ValueError(f"reference_free=True, but {came} was given")
        elif not given and ref_logps is None:
            for row, _, _ in self.losses:
                if row.reference:
                    raise ValueError(
                        f"{row.name!r} needs a reference: give {name}, ref_logps or "
                        "reference_free=True"
                    )
        if ref_logps is not None:
            checks.floating("ref_logps", ref_logps)
            checks.same_device("ref_logps", ref_logps, "labels", self.layout.targets)
            self._check_ref_shape(ref_logps)

    def _check_ref_shape(self, ref_logps: Tensor) -> None:
        sums = (self.layout.sequences,)
        rows = self.layout.shape
        shape, per_token = tuple(ref_logps.shape), self.per_token
        if (shape != sums or per_token) and (shape != rows or per_token is False):
            kinds = {False: f"{list(sums)} (sequence sums)", True: f"{list(rows)} (one a token)"}
            told = kinds.values() if per_token is None else [kinds[per_token]]
            why = "" if per_token is None else f" with ref_logps_per_token={per_token}"
            raise ValueError(
                f"ref_logps must have shape {' or '.join(told)}{why}, got {list(shape)}"
            )
        if per_token is None and sums == rows:
            raise ValueError(
                f"ref_logps {list(sums)} may be sequence sums or one value a token, of which there "
                "are as many here: say ref_logps_per_token=False or True"
            )

    def is_sums(self, ref_logps: Tensor) -> bool:
        """Whether `ref_logps` holds sequence sums, not one value a token."""
        if self.per_token is not None:
            return not self.per_token
        return tuple(ref_logps.shape) == (self.layout.sequences,)

    def sums(self, values: Tensor, tail_weight: float = 1.0) -> tuple[Tensor, Tensor]:
        return ops.sequence_sum(
            values,
            self.layout.targets,
            self.layout.cu_seqlens,
            ignore_index=self.layout.ignore_index,
            tail_weight=tail_weight,
            backend=self.backend,
        )

    def sums_of(self, values: Tensor, targets: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
        """Those of other rows, with the weights of this loss."""
        return ops.sequence_sum(
            values,
            targets,
            cu,
            ignore_index=self.layout.ignore_index,
            tail_weight=self.tail,
            backend=self.backend,
        )

    def without_common_prefix(self, ref_logps: Tensor | None, states: Tensor) -> TokenLoss:
        """The same loss where the tokens that both completions start with are not scored."""
        o = self.options
        for row, _, terms in self.losses:
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
                    f"drop_common_prefix: with {name}={getattr(o, name)!r} common tokens do not "
                    "cancel"
                )
        if ref_logps is not None and self.is_sums(ref_logps):
            raise ValueError(
                "drop_common_prefix needs ref_logps per token (the shape of reduction='none'), got "
                "sums, which contain the tokens that are dropped"
            )
        return replace(self, layout=self.layout.without_common_prefix(states))

    def of_pairs(
        self, first: int, last: int, layout: Layout, num_chosen_tokens: float
    ) -> tuple[TokenLoss, list[str]]:
        """The share of pairs first .. last - 1 in the loss of the whole batch, in fp64.

        `layout` is theirs alone; `num_chosen_tokens` the batch's count of scored chosen tokens.
        Options that want a gradient come as leaves, named.
        """
        o, B = self.options, self.layout.sequences // 2
        changes: dict[str, Any] = {
            "num_pairs": B if o.num_pairs is None else o.num_pairs,
            "num_chosen_tokens": (
                max(num_chosen_tokens, 1) if o.num_chosen_tokens is None else o.num_chosen_tokens
            ),
        }
        leaves = []
        for name in _losses.PER_PAIR:
            value = getattr(o, name)
            if not isinstance(value, Tensor):
                continue
            part = value.detach() if value.dim() == 0 else value.detach()[first:last]
            if value.requires_grad:
                # In fp64: the shares of the chunks, and of a list of losses, add up in it.
                part = part.double().clone().requires_grad_()
                leaves.append(name)
            changes[name] = part
        options = replace(o, **changes)
        share = replace(
            self,
            layout=layout,
            options=options,
            dtype=torch.float64,
            per_token=False,
            asked=(),
            ordinary=None,
        )
        return share, leaves

    @property
    def tail(self) -> float:
        """What a scored token past the shorter completion of its pair weighs (LD-DPO)."""
        return 1.0 if self.options.ld_alpha is None else float(self.options.ld_alpha)

    def reference_sums(self, tokens: Tensor | None, ref_logps: Tensor | None) -> Tensor | None:
        """[2B] of a reference's log-probs a row [R, T], or of `ref_logps` as the user gave it."""
        if tokens is None and ref_logps is not None and self.uses_reference:
            if self.is_sums(ref_logps):
                return ref_logps.detach() if ref_logps.requires_grad else ref_logps
            tokens = self.layout.from_per_token("ref_logps", ref_logps.detach())
        return None if tokens is None else self.sums(tokens, self.tail)[0]

    def is_direct(
        self, logits: Tensor, ref_logits: Tensor | None, ref_logps: Tensor | None
    ) -> bool:
        """Whether one autograd function over the backend's functions gives loss and gradient."""
        if self.ordinary is None or self.backend == "torch":
            return False
        for x in (logits, ref_logits):
            if x is not None and (
                x.dtype not in FUSED_DTYPES or (x.shape[-1] > 1 and x.stride(-1) != 1)
            ):
                return False
        return eager(logits, ref_logits, ref_logps, self.layout.targets, self.layout.cu_seqlens)

    def finish_logits(
        self,
        logits: Tensor,
        ref_logits: Tensor | None,
        ref_logps: Tensor | None,
        transform: LogitTransform,
        inplace: bool,
    ) -> DPOOutput:
        """Loss and rewards from logits [R, T, V], where `is_direct`."""
        assert self.ordinary is not None
        write = inplace and logits.requires_grad and torch.is_grad_enabled()
        if write:
            ops.check_writable(logits)
        reference = None if ref_logits is not None else self.reference_sums(None, ref_logps)
        call = LogitsCall(
            self.ordinary,
            self.layout,
            self.dtype,
            transform,
            self.stats,
            self.tail,
            write,
            None if ref_logits is None else ref_logits.detach(),
            reference,
            self.backend,
            load(self.backend),
        )
        out, stats = from_logits(call, logits)
        return out.told(None, self.shown(stats))

    def finish(
        self,
        policy: TokenLogps,
        ref_tokens: Tensor | None,
        ref_logps: Tensor | None,
        kl: Tensor | None = None,
    ) -> DPOOutput:
        """Loss and rewards from values a row [R, T]: policy, reference and the KL between them.

        `ref_logps` as the user gave it: [2B] sums or per token.
        """
        B = self.layout.sequences // 2
        tail = self.tail
        sums, counts = self.sums(policy.logps, tail)
        reference = self.reference_sums(ref_tokens, ref_logps)
        if self.ordinary is not None and self.backend != "torch" and eager(sums):
            call = SumsCall(
                self.ordinary,
                self.losses,
                self.dtype,
                reference,
                counts if self.ordinary.row.by_length else None,
                self.backend,
                load(self.backend),
            )
            return from_sums(call, sums).told(None, self.shown(policy.stats))
        plain = sums if tail == 1.0 else self.sums(policy.logps)[0]
        reference = None if reference is None else reference.double()
        wpo = None
        if self.options.use_weighting:
            aligned = policy.logps.detach() - policy.stats["log_sum_sq_probs"]
            mean = self.sums(aligned)[0] / counts.clamp(min=1).double()
            wpo = (mean[:B] + mean[B:]).exp()
        kl_sums = None if kl is None else self.sums(kl)[0]
        pairs = Pairs(
            chosen=sums[:B],
            rejected=sums[B:],
            ref_chosen=None if reference is None else reference[:B],
            ref_rejected=None if reference is None else reference[B:],
            chosen_lengths=counts[:B],
            rejected_lengths=counts[B:],
            chosen_nll=-plain[:B],
            wpo=wpo,
            chosen_kl=None if kl_sums is None else kl_sums[:B],
            rejected_kl=None if kl_sums is None else kl_sums[B:],
        )
        out = loss_of(pairs, self.options, self.losses, self.dtype, self.backend)
        return out.told(None, self.shown(policy.stats)) if self.asked else out


def op_of(losses: list) -> str:
    """The op that reads the logits for these losses, as `backends.choose` knows it."""
    return "token_kl" if any(row.needs_kl for row, _, _ in losses) else "token_logps"


def reduce(layout: Layout, tokens: TokenLogps, reduction: str, backend: str | None) -> Any:
    if reduction == "none":
        logps = layout.per_token(tokens.logps)
    else:
        name = choose(backend, tokens.logps.device, tokens.logps.dtype, "sequence_sum")
        sums, counts = ops.sequence_sum(
            tokens.logps,
            layout.targets,
            layout.cu_seqlens,
            ignore_index=layout.ignore_index,
            backend=name,
        )
        logps = sums / counts.clamp(min=1) if reduction == "mean" else sums
        logps = logps.to(tokens.logps.dtype)
    if not tokens.stats:
        return logps
    return logps, {name: layout.per_token(value) for name, value in tokens.stats.items()}


def last_size(name: str, value: object) -> int:
    tensor = checks.floating(name, value)
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have shape [rows, T, V] or [N, V], got []")
    return tensor.shape[-1]


def head_size(hidden: object, weight: object) -> int:
    """V, of a head that fits the hidden states: before labels are held against it."""
    states, head = checks.floating("hidden", hidden), checks.floating("weight", weight)
    if head.dim() != 2:
        raise ValueError(f"weight must have shape [V, H], got {list(head.shape)}")
    if states.dim() and head.shape[1] != states.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, H={states.shape[-1]}] (H as hidden has), got "
            f"{list(head.shape)}"
        )
    return head.shape[0]


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
