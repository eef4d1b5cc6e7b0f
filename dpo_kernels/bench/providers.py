"""Who computes: ours, torch, and the peers, behind one signature a suite.

A provider is a name, where to get it, and `call(inputs) -> result`, in which `inputs` is an
`Inputs` and the result the loss (or the sequence log-probs, in suites without a loss). Peers are
called as their documentation says, through their public functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dpo_kernels as dk

from .cases import Case

BETA = 0.1
IGNORE = -100


@dataclass
class Inputs:
    """Tensors of a case; those that want a gradient are leaves."""

    case: Case
    labels: Tensor  # [2B, T]
    ref_logps: Tensor  # [2B]
    logits: Tensor | None = None  # [2B, T, V]
    hidden: Tensor | None = None  # [2B, T, H]
    weight: Tensor | None = None  # [V, H]
    logps: Tensor | None = None  # [2B], of the suite "pair loss"
    model: Any = None  # of the suite "training step"
    optimizer: Any = None

    @property
    def softcap(self) -> float | None:
        return self.case.shape.softcap

    def leaves(self) -> list[Tensor]:
        tensors = (self.logits, self.hidden, self.weight, self.logps)
        return [x for x in tensors if x is not None and x.requires_grad]

    def scored(self) -> tuple[Tensor, Tensor]:
        """[2B, T - 1] labels aligned with the rows that score them, and which are scored."""
        y = self.labels[:, 1:]
        return y, y != IGNORE


@dataclass(frozen=True)
class Provider:
    name: str
    call: Callable[[Inputs], Any]
    ours: bool = False
    overwrites: bool = False  # its gradient is written over the logits
    reference: str = "given"  # "policy": the policy itself, "none": no reference


class Absent(Exception):
    """The peer is not here; the text is how to get it."""


def pair_loss(sums: Tensor, ref: Tensor) -> Tensor:
    return pair_loss_wide(sums.float(), ref)


def pair_loss_wide(sums: Tensor, ref: Tensor) -> Tensor:
    chosen, rejected = (sums - ref).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager_sums(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """What most code does: log_softmax in the logits' dtype, gather, mask, sum."""
    y = labels[:, 1:]
    scored = y != IGNORE
    logp = softcapped(logits[:, :-1], softcap).log_softmax(-1)
    tokens = logp.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (tokens * scored).sum(-1)


def eager_linear_sums(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None):
    return eager_sums(F.linear(hidden, weight).float(), labels, softcap)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def providers(case: Case, device: str) -> Iterator[tuple[str, Callable[[], Provider]]]:
    """Names and makers of the providers of a suite; a maker raises `Absent`."""
    kind = case.suite.split()[0]
    table: dict[str, Callable[[], Provider]] = {}
    if kind in ("logits", "small"):
        table = _from_logits(case, device)
    elif kind == "linear":
        table = _linear(case, device)
    elif kind == "pair":
        table = _pair()
    else:
        table = _step()
    yield from table.items()


def our_backends(device: str) -> list[str]:
    return ["triton", "cuda"] if device == "cuda" else ["cpu"]


def _mine(backend: str) -> None:
    usable = dk.backends.available()
    if backend not in usable:
        raise Absent(usable.why_not[backend])


def _from_logits(case: Case, device: str) -> dict[str, Callable[[], Provider]]:
    forward = case.suite == "logits forward"

    def ours(backend: str, inplace: bool) -> Provider:
        _mine(backend)

        def call(x: Inputs) -> Tensor:
            options: dict[str, Any] = {"logit_softcap": x.softcap, "backend": backend}
            assert x.logits is not None
            if forward:
                return dk.sequence_logps(x.logits, x.labels, **options)
            return dk.fused_dpo_loss(
                x.logits.view_as(x.logits),
                x.labels,
                ref_logps=x.ref_logps,
                beta=BETA,
                inplace=inplace,
                **options,
            ).loss

        return Provider(f"dpo-kernels {backend}{' in place' * inplace}", call, True, inplace)

    def loss_of(sums: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
        def call(x: Inputs) -> Tensor:
            s = sums(x.logits, x.labels, x.softcap)
            return s if forward else pair_loss(s, x.ref_logps)

        return call

    def cross_entropy(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        z = softcapped(logits[:, :-1], softcap)
        loss = F.cross_entropy(z.transpose(1, 2), labels[:, 1:], reduction="none")
        return -loss.sum(-1)

    def trl() -> Provider:
        selective = _import("trl.trainer.utils", "selective_log_softmax", "trl")

        def sums(logits, labels, softcap):
            y = labels[:, 1:]
            tokens = selective(softcapped(logits[:, :-1], softcap), y.clamp(min=0))
            return (tokens * (y != IGNORE)).sum(-1)

        return Provider("TRL selective_log_softmax", loss_of(sums))

    def liger() -> Provider:
        if device != "cuda":
            raise Absent("needs a GPU")
        loss = _import("liger_kernel.transformers", "LigerCrossEntropyLoss", "liger-kernel")

        def sums(logits, labels, softcap):
            ce = loss(reduction="none", softcap=softcap)
            flat = ce(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
            return -flat.view(labels.shape[0], -1).sum(-1)

        return Provider("Liger cross-entropy", loss_of(sums))

    def quack() -> Provider:
        if device != "cuda":
            raise Absent("needs a GPU")
        ce = _import("quack", "cross_entropy", "quack-kernels")

        def sums(logits, labels, softcap):
            rows = softcapped(logits[:, :-1], softcap).reshape(-1, logits.shape[-1])
            flat = ce(rows, labels[:, 1:].reshape(-1), ignore_index=IGNORE, reduction="none")
            return -flat.view(labels.shape[0], -1).sum(-1)

        return Provider("QuACK cross-entropy", loss_of(sums))

    def flash() -> Provider:
        if device != "cuda":
            raise Absent("needs a GPU")
        ce = _import("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", "flash-attn")

        def sums(logits, labels, softcap):
            rows = softcapped(logits[:, :-1], softcap).reshape(-1, logits.shape[-1])
            flat, _ = ce(rows, labels[:, 1:].reshape(-1), ignore_index=IGNORE)
            return -flat.view(labels.shape[0], -1).sum(-1)

        return Provider("flash-attn cross-entropy", loss_of(sums))

    table: dict[str, Callable[[], Provider]] = {}
    for backend in our_backends(device):
        table[f"dpo-kernels {backend}"] = functools.partial(ours, backend, False)
        if not forward:
            table[f"dpo-kernels {backend} in place"] = functools.partial(ours, backend, True)
    table["torch eager"] = lambda: Provider("torch eager", loss_of(eager_sums))
    table["torch cross_entropy"] = lambda: Provider("torch cross_entropy", loss_of(cross_entropy))
    table["torch.compile"] = lambda: Provider("torch.compile", loss_of(compiled(eager_sums)))
    table["TRL selective_log_softmax"] = trl
    table |= {
        "Liger cross-entropy": liger,
        "QuACK cross-entropy": quack,
        "flash-attn cross-entropy": flash,
    }
    return table


def _linear(case: Case, device: str) -> dict[str, Callable[[], Provider]]:
    forward = case.suite == "linear reference"

    def ours(backend: str) -> Provider:
        _mine(backend)

        def call(x: Inputs) -> Tensor:
            options: dict[str, Any] = {"logit_softcap": x.softcap, "backend": backend}
            assert x.hidden is not None and x.weight is not None
            if forward:
                return dk.linear_sequence_logps(x.hidden, x.weight, x.labels, **options)
            return dk.fused_linear_dpo_loss(
                x.hidden, x.weight, x.labels, ref_logps=x.ref_logps, beta=BETA, **options
            ).loss

        return Provider(f"dpo-kernels {backend}", call, True)

    def loss_of(sums: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
        def call(x: Inputs) -> Tensor:
            s = sums(x.hidden, x.weight, x.labels, x.softcap)
            return s if forward else pair_loss(s, x.ref_logps)

        return call

    def of_rows(nll: Callable[[Tensor, Tensor, Tensor, float | None], Tensor]):
        """From the NLL of flat rows [N, H] with labels [N], IGNORE where not scored."""

        def sums(hidden, weight, labels, softcap):
            flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            return (
                -nll(flat, weight, labels[:, 1:].reshape(-1), softcap)
                .view(labels.shape[0], -1)
                .sum(-1)
            )

        return sums

    def torch_fused() -> Provider:
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise Absent("pip install 'torch>=2.13'")
        if case.shape.softcap is not None:
            raise Absent("has no softcap")
        nll = of_rows(lambda h, w, y, _: function(h, w, y, reduction="none"))
        return Provider("torch linear_cross_entropy", loss_of(nll))

    def trl(scored_only: bool) -> Provider:
        kernel = _import("trl.kernels", "ChunkedLogProbFunction", "trl>=1.16")

        def nll(h, w, y, softcap):
            mask = y != IGNORE
            rows = (h[mask], w, None, y[mask]) if scored_only else (h, w, None, y.clamp(min=0))
            logp = kernel.apply(*rows, 1.0, 32768, softcap, 1.0, ())[0]
            picked = logp if scored_only else logp[mask]
            return -logp.new_zeros(mask.shape).masked_scatter(mask, picked)

        # TRL itself keeps to the scored rows on GPUs alone.
        name = "TRL chunked log-probs" + (", scored rows" if scored_only else "")
        return Provider(name, loss_of(of_rows(nll)))

    def liger(with_reference: bool) -> Provider:
        make = _import("liger_kernel.chunked_loss", "LigerFusedLinearDPOLoss", "liger-kernel")
        if forward:
            raise Absent("has no reference pass of its own")
        if case.shape.softcap is not None:
            raise Absent("has no softcap")
        loss = make(use_ref_model=with_reference, compiled=device == "cuda", beta=BETA)

        def call(x: Inputs) -> Tensor:
            assert x.hidden is not None and x.weight is not None
            h, reference = x.hidden[:, :-1], {}
            if with_reference:  # it takes no log-probs: the reference is projected in the call
                reference = {"ref_input": h.detach(), "ref_weight": x.weight.detach()}
            return loss(x.weight, h, x.labels[:, 1:], **reference)[0]

        name = "Liger DPO" + ("" if with_reference else " without reference")
        return Provider(name, call, reference="policy" if with_reference else "none")

    def cce() -> Provider:
        function = _import("cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy")
        impl = "cce" if device == "cuda" else "torch_compile"

        def nll(h, w, y, softcap):
            return function(h, w, y, softcap=softcap, reduction="none", impl=impl)

        return Provider("cut-cross-entropy", loss_of(of_rows(nll)))

    def liger_scaled() -> Provider:
        if device != "cuda":
            raise Absent("needs a GPU")
        function = _import(
            "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", "liger-kernel"
        )

        def nll(h, w, y, softcap):
            return function(reduction="none", softcap=softcap)(w, h, y)

        return Provider("Liger linear cross-entropy", loss_of(of_rows(nll)))

    def quack() -> Provider:
        if device != "cuda":
            raise Absent("needs a GPU")
        function = _import("quack.linear_cross_entropy", "linear_cross_entropy", "quack-kernels")

        def nll(h, w, y, _):
            return function(h, w, y, ignore_index=IGNORE, reduction="none")

        return Provider("QuACK linear cross-entropy", loss_of(of_rows(nll)))

    table: dict[str, Callable[[], Provider]] = {
        f"dpo-kernels {backend}": functools.partial(ours, backend)
        for backend in our_backends(device)
    }
    table["torch eager"] = lambda: Provider("torch eager", loss_of(eager_linear_sums))
    table["torch.compile"] = lambda: Provider("torch.compile", loss_of(compiled(eager_linear_sums)))
    table["torch linear_cross_entropy"] = torch_fused
    if device != "cuda":
        table["TRL chunked log-probs"] = functools.partial(trl, False)
    table["TRL chunked log-probs, scored rows"] = functools.partial(trl, True)
    table["Liger DPO"] = functools.partial(liger, True)
    table["Liger DPO without reference"] = functools.partial(liger, False)
    table |= {
        "Liger linear cross-entropy": liger_scaled,
        "cut-cross-entropy": cce,
        "QuACK linear cross-entropy": quack,
    }
    return table


def _pair() -> dict[str, Callable[[], Provider]]:
    def ours(x: Inputs) -> Tensor:
        assert x.logps is not None
        return dk.preference_loss(*x.logps.chunk(2), *x.ref_logps.chunk(2), beta=BETA).loss

    def eager(x: Inputs) -> Tensor:
        assert x.logps is not None
        loss = pair_loss(x.logps, x.ref_logps)
        with torch.no_grad():  # what every trainer logs, and ours gives along
            rewards = BETA * (x.logps - x.ref_logps)
            chosen, rejected = rewards.chunk(2)
            (chosen - rejected), (chosen > rejected).float()
        return loss

    return {
        "dpo-kernels": lambda: Provider("dpo-kernels", ours, True),
        "torch eager": lambda: Provider("torch eager", eager),
        "torch.compile": lambda: Provider("torch.compile", compiled(eager)),
    }


def _step() -> dict[str, Callable[[], Provider]]:
    """The trunk is the same; what differs is what stands between its hidden states and the loss."""

    def step(loss_of: Callable[[Inputs, Any], Tensor]) -> Callable[[Inputs], Tensor]:
        def call(x: Inputs) -> Tensor:
            ids = x.labels.clamp(min=0)
            loss = loss_of(x, x.model.model(ids).last_hidden_state)
            loss.backward()
            x.optimizer.step()
            x.optimizer.zero_grad()
            return loss.detach()

        return call

    def ours(x: Inputs, hidden: Tensor) -> Tensor:
        weight = x.model.lm_head.weight
        return dk.fused_linear_dpo_loss(
            hidden, weight, x.labels, ref_logps=x.ref_logps, beta=BETA
        ).loss

    def eager(x: Inputs, hidden: Tensor) -> Tensor:
        logits = x.model.lm_head(hidden).float()
        return pair_loss(eager_sums(logits, x.labels, None), x.ref_logps)

    def trl() -> Provider:
        kernel = _import("trl.kernels", "ChunkedLogProbFunction", "trl>=1.16")

        def loss(x: Inputs, hidden: Tensor) -> Tensor:
            y, mask = x.scored()
            h = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            rows = (h, x.model.lm_head.weight, None, y.reshape(-1).clamp(min=0))
            logp = kernel.apply(*rows, 1.0, 32768, None, 1.0, ())[0].view(y.shape)
            return pair_loss((logp * mask).sum(-1), x.ref_logps)

        return Provider("TRL chunked log-probs", step(loss))

    return {
        "dpo-kernels": lambda: Provider("dpo-kernels", step(ours), True),
        "torch eager": lambda: Provider("torch eager", step(eager)),
        "TRL chunked log-probs": trl,
    }


def _import(module: str, name: str, package: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Absent(f"pip install '{package}' ({error})") from None
