"""The public functions: log-probs, and DPO losses, from logits, hidden states or log-probs.

Each is a composition of ops: token log-probs -> sequence sums -> pair loss. The heavy op sees one
scalar a sequence from the loss, so any loss of `losses.TABLE` costs the same.

Letters: `B` pairs, `T` positions, `N` rows of packed input, `V` vocabulary, `H` hidden size. A
batch of pairs is [chosen; rejected]: sequence i is chosen, sequence B + i its rejected partner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import losses as _losses
from . import ops
from .backends import SMALL_BATCH, choose
from .layout import Layout
from .ops import TokenLogps, checks
from .pairs import DPOOutput, Pairs, check_pair_options, loss_of
from .transform import LogitTransform

__all__ = [
    "DPOOutput",
    "fused_dpo_loss",
    "fused_linear_dpo_loss",
    "linear_sequence_logps",
    "preference_loss",
    "sequence_logps",
]


def fused_dpo_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    inplace: bool = False,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    **loss_options: Any,
) -> DPOOutput:
    """DPO loss of a batch of pairs from the policy's logits.

    L = -log sigmoid(beta [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)])  (arXiv 2305.18290)
    or any other loss of `losses.TABLE` by `loss_type`.

    Args:
        logits: [2B, T, V] or packed [N, V]; fp32, bf16, fp16 (fp64 on the torch backend); unit
            stride in V, other strides free: views such as `logits[:, :-1]` are not copied.
        labels: [2B, T] or packed [N] int64, aligned with the input ids; `ignore_index` (prompt,
            padding) is not scored, and those rows are neither read nor computed.
        ref_logits: like `logits`, scored without gradient; or
        ref_logps: the reference's log-probs: sequence sums [2B], or per token in the shape that
            `sequence_logps(reduction="none")` gives. Exactly one of the two, or
            `reference_free=True`; losses without a reference (`simpo`, `orpo`, `cpo`, `alphapo`,
            `slic`) ignore it.
        cu_seqlens: [2B + 1] int32 or int64 boundaries, for packed input.
        shift: `logits[:, t]` scores `labels[:, t + 1]` (True, Hugging Face) or `labels[:, t]`.
        inplace: the backward writes the gradient over `logits` (no [2B, T, V] allocation). Another
            consumer of `logits` that runs its backward later raises. Under torch.compile, which
            owns the buffers, it is ignored.
        temperature, logit_softcap, logit_scale: z = softcap(logit_scale * x) / temperature, with
            softcap(x) = cap * tanh(x / cap); policy and reference alike.
        backend: "triton", "cpu" or "torch"; None picks by device.
        **loss_options: `losses.LossOptions`.

    Returns:
        `DPOOutput`; `loss` is a scalar or [B] with `reduction="none"`.

    Raises:
        ValueError, TypeError: a wrong argument, named, before any kernel runs.
    """
    options, rows = _losses.resolve(loss_options)
    transform = LogitTransform.of(temperature, logit_softcap, logit_scale)
    V = _last_size("logits", logits)
    layout = Layout.of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index, V=V)

    def score(x: Tensor, name: str, stats: tuple[str, ...], inplace: bool) -> TokenLogps:
        return ops.token_logps(
            layout.rows(name, x, "V"), layout.targets, ignore_index=ignore_index,
            transform=transform, stats=stats, inplace=inplace, backend=backend,
        )  # fmt: skip

    name = choose(backend, logits.device, checks.floating("logits", logits).dtype, "sequence_sum")
    run = _Run(layout, options, rows, name, _wide(logits))
    if ref_logits is not None:
        layout.rows("ref_logits", ref_logits, "V")
        checks.shape("ref_logits", ref_logits, tuple(logits.shape), "that of logits")
    run.check(ref_logits is not None, "ref_logits", ref_logps)
    reference = None
    if ref_logits is not None and run.uses_reference:
        with torch.no_grad():
            reference = score(ref_logits, "ref_logits", (), False).logps
    if run.is_small(logits, ref_logps):
        x = layout.rows("logits", logits, "V")
        return run.finish_small(x, reference, ref_logps, transform, inplace)
    policy = score(logits, "logits", run.stats, inplace)
    return run.finish(policy, reference, ref_logps)


def fused_linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    memory_budget: int | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    **loss_options: Any,
) -> DPOOutput:
    """DPO loss of a batch of pairs straight from hidden states and the lm_head weight.

    As `fused_dpo_loss` of `hidden @ weight.T + bias`, without the [2B, T, V] logits: only scored
    rows are projected, a chunk of at most `memory_budget` bytes (default 256 MiB) at a time.

    Args:
        hidden: [2B, T, H] or packed [N, H], the policy's last hidden states.
        weight: [V, H] lm_head weight; bias: [V].
        labels, cu_seqlens, shift, ignore_index: as `fused_dpo_loss`.
        ref_hidden: [2B, T, H'] reference hidden states, scored without gradient with `ref_weight`
            [V, H'] and `ref_bias`, or with `weight` and `bias` detached; or
        ref_logps: as `fused_dpo_loss`.
        memory_budget: bytes of logits held at once; the result depends on it by rounding alone.
        temperature, logit_softcap, logit_scale, backend, **loss_options: as `fused_dpo_loss`.

    Raises:
        ValueError, TypeError: a wrong argument, named, before any kernel runs.
    """
    options, rows = _losses.resolve(loss_options)
    transform = LogitTransform.of(temperature, logit_softcap, logit_scale)
    V = _head_size(weight)
    layout = Layout.of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index, V=V)
    head = _Head(layout, memory_budget, backend, transform)
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias need ref_hidden, got None")
    name = choose(backend, hidden.device, checks.floating("hidden", hidden).dtype, "sequence_sum")
    run = _Run(layout, options, rows, name, _wide(hidden))
    run.check(ref_hidden is not None, "ref_hidden", ref_logps)
    if ref_hidden is not None:
        layout.rows("ref_hidden", ref_hidden, "H")
    policy = head.score("hidden", hidden, weight, bias, run.stats)
    reference = None
    if ref_hidden is not None and run.uses_reference:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias
        with torch.no_grad():
            reference = head.score("ref_hidden", ref_hidden, ref_weight, ref_bias, ()).logps
    return run.finish(policy, reference, ref_logps)


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
    transform = LogitTransform.of(temperature, logit_softcap, logit_scale)
    V = _last_size("logits", logits)
    layout = Layout.of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index, V=V)
    tokens = ops.token_logps(
        layout.rows("logits", logits, "V"), layout.targets, ignore_index=ignore_index,
        transform=transform, stats=ops.check_stats(stats), inplace=inplace, backend=backend,
    )  # fmt: skip
    return _reduce(layout, tokens, reduction, backend)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "sum",
    stats: tuple[str, ...] = (),
    memory_budget: int | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> Any:
    """`sequence_logps` of `hidden @ weight.T + bias`, projecting only scored rows, in chunks.

    `hidden` [sequences, T, H] or packed [N, H], `weight` [V, H], `bias` [V]; the rest as
    `sequence_logps` and `fused_linear_dpo_loss`.
    """
    transform = LogitTransform.of(temperature, logit_softcap, logit_scale)
    V = _head_size(weight)
    layout = Layout.of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index, V=V)
    head = _Head(layout, memory_budget, backend, transform)
    tokens = head.score("hidden", hidden, weight, bias, ops.check_stats(stats))
    return _reduce(layout, tokens, reduction, backend)


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
    options, rows = _losses.resolve(loss_options)
    by_token = {"ld_alpha": options.ld_alpha is not None, "use_weighting": options.use_weighting}
    for option, wanted in by_token.items():
        if wanted:
            raise ValueError(f"{option} needs per-token log-probs; use fused_dpo_loss")
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps",
             "chosen_lengths", "rejected_lengths")  # fmt: skip
    values = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
              chosen_lengths, rejected_lengths)  # fmt: skip
    checks.floating("chosen_logps", chosen_logps)
    if chosen_logps.dim() != 1:
        raise ValueError(f"chosen_logps must have shape [B], got {list(chosen_logps.shape)}")
    shape = tuple(chosen_logps.shape)
    for name, value in zip(names, values, strict=True):
        if value is None and name not in ("chosen_logps", "rejected_logps"):
            continue
        tensor = checks.is_tensor(name, value)
        if "lengths" not in name:
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

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    chosen = chosen_logps.double()
    pairs = Pairs(
        chosen, rejected_logps.double(), wide(ref_chosen_logps), wide(ref_rejected_logps),
        chosen_lengths, rejected_lengths, -chosen, None,
    )  # fmt: skip
    name = choose(backend, chosen_logps.device, torch.float32, "pair_loss")
    wide_input = torch.float64 in (chosen_logps.dtype, rejected_logps.dtype)
    if wide_input and backend is None:
        name = "torch"
    return loss_of(pairs, options, rows, torch.float64 if wide_input else torch.float32, name)


@dataclass(frozen=True)
class _Run:
    """One loss over token log-probs: what it needs of them, and the way to `DPOOutput`."""

    layout: Layout
    options: _losses.LossOptions
    losses: list
    backend: str
    dtype: torch.dtype

    @property
    def stats(self) -> tuple[str, ...]:
        return ("log_sum_sq_probs",) if self.options.use_weighting else ()

    @property
    def uses_reference(self) -> bool:
        return any(row.reference or row.name == "sft" for row, _, _ in self.losses)

    def check(self, given: bool, name: str, ref_logps: Tensor | None) -> None:
        S = self.layout.sequences
        if S % 2:
            raise ValueError(
                f"a batch of pairs is [chosen; rejected], an even number of rows, got {S}"
            )
        check_pair_options(self.options, S // 2, self.layout.targets)
        if given and ref_logps is not None:
            raise ValueError(f"give {name} or ref_logps, not both")
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
            if tuple(ref_logps.shape) != (S,):
                self.layout.from_per_token("ref_logps", ref_logps)

    def sums(self, values: Tensor, tail_weight: float = 1.0) -> tuple[Tensor, Tensor]:
        return ops.sequence_sum(
            values, self.layout.targets, self.layout.cu_seqlens,
            ignore_index=self.layout.ignore_index, tail_weight=tail_weight, backend=self.backend,
        )  # fmt: skip

    def is_small(self, logits: Tensor, ref_logps: Tensor | None) -> bool:
        """Whether one launch from logits to loss can do it, and pays (`ops/small_batch.py`)."""
        o, (row, weight, terms) = self.options, self.losses[0]
        plain = len(self.losses) == 1 and weight == 1 and bool(terms) and row.score == "ratio"
        plain = plain and row.sft is None and not row.batch_coupled and not row.by_length
        plain = plain and (o.f_divergence_type == "reverse_kl" or not row.f_divergence)
        plain = plain and not self.stats and o.ld_alpha is None and o.weights is None
        plain = plain and o.sft_weight == 0 and o.reduction == "mean"
        fixed = all(
            not isinstance(x, Tensor) or (x.dim() == 1 and not x.requires_grad)
            for x in (o.beta, o.offset)
        )
        # One value a token would have to be summed first: the composition does that.
        sums = ref_logps is None or tuple(ref_logps.shape) == (self.layout.sequences,)
        return (
            plain
            and fixed
            and sums
            and not isinstance(o.num_pairs, Tensor)
            and not torch.compiler.is_compiling()
            and logits.numel() <= SMALL_BATCH.get(self.backend, -1)
            and (logits.shape[-1] == 1 or logits.stride(-1) == 1)
        )

    def finish_small(
        self,
        logits: Tensor,
        ref_tokens: Tensor | None,
        ref_logps: Tensor | None,
        transform: LogitTransform,
        inplace: bool,
    ) -> DPOOutput:
        row, _, terms = self.losses[0]
        reference = None
        if ref_tokens is not None:
            reference = self.sums(ref_tokens)[0]
        elif ref_logps is not None and row.reference:
            reference = ref_logps.detach().contiguous()
            if reference.dtype not in (torch.float32, torch.float64):
                reference = reference.float()
        pairs = self.layout.sequences // 2
        num_pairs = self.options.num_pairs
        assert not isinstance(num_pairs, Tensor)
        loss, table = ops.small_batch(
            logits, self.layout.targets, self.layout.cu_seqlens, reference, terms,
            beta=self.options.beta, offset=self.options.offset,
            divisor=float(pairs if num_pairs is None else num_pairs),
            ignore_index=self.layout.ignore_index, transform=transform, inplace=inplace,
            backend=self.backend,
        )  # fmt: skip
        return DPOOutput(loss, *table.unbind(0))

    def finish(
        self, policy: TokenLogps, ref_tokens: Tensor | None, ref_logps: Tensor | None
    ) -> DPOOutput:
        B = self.layout.sequences // 2
        ld_alpha = self.options.ld_alpha
        tail = 1.0 if ld_alpha is None else float(ld_alpha)
        sums, counts = self.sums(policy.logps, tail)
        plain = sums if tail == 1.0 else self.sums(policy.logps)[0]
        reference: Tensor | None = None
        if ref_tokens is not None:
            reference = self.sums(ref_tokens, tail)[0]
        elif ref_logps is not None and self.uses_reference:
            if tuple(ref_logps.shape) == (2 * B,):
                reference = ref_logps.detach().double()
            else:
                tokens = self.layout.from_per_token("ref_logps", ref_logps.detach())
                reference = self.sums(tokens, tail)[0]
        wpo = None
        if self.options.use_weighting:
            aligned = policy.logps.detach() - policy.stats["log_sum_sq_probs"]
            mean = self.sums(aligned)[0] / counts.clamp(min=1).double()
            wpo = (mean[:B] + mean[B:]).exp()
        pairs = Pairs(
            chosen=sums[:B],
            rejected=sums[B:],
            ref_chosen=None if reference is None else reference[:B],
            ref_rejected=None if reference is None else reference[B:],
            chosen_lengths=counts[:B],
            rejected_lengths=counts[B:],
            chosen_nll=-plain[:B],
            wpo=wpo,
        )
        return loss_of(pairs, self.options, self.losses, self.dtype, self.backend)


@dataclass(frozen=True)
class _Head:
    """The lm_head arguments that policy and reference share."""

    layout: Layout
    memory_budget: int | None
    backend: str | None
    transform: LogitTransform

    def score(
        self,
        name: str,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stats: tuple[str, ...],
    ) -> TokenLogps:
        return ops.linear_logps(
            self.layout.rows(name, hidden, "H"), weight, self.layout.targets, bias=bias,
            ignore_index=self.layout.ignore_index, transform=self.transform, stats=stats,
            memory_budget=self.memory_budget, backend=self.backend,
        )  # fmt: skip


def _reduce(layout: Layout, tokens: TokenLogps, reduction: str, backend: str | None) -> Any:
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction must be 'sum', 'mean' or 'none', got {reduction!r}")
    if reduction == "none":
        logps = layout.per_token(tokens.logps)
    else:
        name = choose(backend, tokens.logps.device, tokens.logps.dtype, "sequence_sum")
        sums, counts = ops.sequence_sum(
            tokens.logps, layout.targets, layout.cu_seqlens,
            ignore_index=layout.ignore_index, backend=name,
        )  # fmt: skip
        logps = sums / counts.clamp(min=1) if reduction == "mean" else sums
        logps = logps.to(tokens.logps.dtype)
    if not tokens.stats:
        return logps
    return logps, {name: layout.per_token(value) for name, value in tokens.stats.items()}


def _last_size(name: str, value: object) -> int:
    tensor = checks.floating(name, value)
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have shape [rows, T, V] or [N, V], got []")
    return tensor.shape[-1]


def _head_size(weight: object) -> int:
    tensor = checks.floating("weight", weight)
    if tensor.dim() != 2:
        raise ValueError(f"weight must have shape [V, H], got {list(tensor.shape)}")
    return tensor.shape[0]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
