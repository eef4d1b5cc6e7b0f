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
    table: dict[str, Callable[[], Provider]] = {}
    for backend in our_backends(device):
        ours = functools.partial(_our_logits, case, backend)
        table[f"dpo-kernels {backend}"] = ours
        if not _is_forward(case):
            table[f"dpo-kernels {backend} in place"] = functools.partial(ours, inplace=True)
    for name, sums in (
        ("torch eager", lambda: eager_sums),
        ("torch cross_entropy", lambda: _cross_entropy),
        ("torch.compile", lambda: compiled(eager_sums)),
        ("TRL selective_log_softmax", _trl_selective),
        ("Liger cross-entropy", lambda: _liger(device)),
        ("QuACK cross-entropy", lambda: _quack(device)),
        ("flash-attn cross-entropy", lambda: _flash(device)),
    ):
        table[name] = functools.partial(_of_sums, case, name, sums)
    return table


def _linear(case: Case, device: str) -> dict[str, Callable[[], Provider]]:
    table: dict[str, Callable[[], Provider]] = {
        f"dpo-kernels {b}": functools.partial(_our_linear, case, b) for b in our_backends(device)
    }
    sums: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "torch eager": lambda: eager_linear_sums,
        "torch.compile": lambda: compiled(eager_linear_sums),
        "torch linear_cross_entropy": lambda: _torch_fused(case),
        "TRL chunked log-probs": lambda: _trl_chunked(False),
        "TRL chunked log-probs, scored rows": lambda: _trl_chunked(True),
    }
    if device == "cuda":  # TRL itself keeps to the scored rows on GPUs alone
        del sums["TRL chunked log-probs"]
    table |= {name: functools.partial(_of_sums, case, name, make) for name, make in sums.items()}
    table["Liger DPO"] = functools.partial(_liger_dpo, case, device, True)
    table["Liger DPO without reference"] = functools.partial(_liger_dpo, case, device, False)
    for name, make in (
        ("Liger linear cross-entropy", _liger_linear),
        ("cut-cross-entropy", _cut),
        ("QuACK linear cross-entropy", _quack_linear),
    ):
        table[name] = functools.partial(_of_sums, case, name, functools.partial(make, device))
    return table


def _is_forward(case: Case) -> bool:
    """Whether the log-probs of sequences are all that is asked for."""
    return case.suite in ("logits forward", "linear reference")


# --- sums over sequences, of (logits, labels, softcap) or (hidden, weight, labels, softcap) ---


def _of_sums(case: Case, name: str, make: Callable[[], Callable[..., Tensor]]) -> Provider:
    """What takes log-probs from a peer, and the loss from torch."""
    sums, forward = make(), _is_forward(case)

    def call(x: Inputs) -> Tensor:
        states = (x.hidden, x.weight) if x.logits is None else (x.logits,)
        s = sums(*states, x.labels, x.softcap)
        return s if forward else pair_loss(s, x.ref_logps)

    return Provider(name, call)


def _of_rows(nll: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """From the NLL of flat rows with labels [N], IGNORE where not scored."""

    def sums(states: Tensor, *rest: Any) -> Tensor:
        *weight, labels, softcap = rest
        rows = states[:, :-1].reshape(-1, states.shape[-1])
        flat = nll(rows, *weight, labels[:, 1:].reshape(-1), softcap)
        return -flat.view(labels.shape[0], -1).sum(-1)

    return sums


def _cross_entropy(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    z = softcapped(logits[:, :-1], softcap)
    loss = F.cross_entropy(z.transpose(1, 2), labels[:, 1:], reduction="none")
    return -loss.sum(-1)


def _trl_selective() -> Callable[..., Tensor]:
    selective = _import("trl.trainer.utils", "selective_log_softmax", "trl")

    def sums(logits, labels, softcap):
        y = labels[:, 1:]
        tokens = selective(softcapped(logits[:, :-1], softcap), y.clamp(min=0))
        return (tokens * (y != IGNORE)).sum(-1)

    return sums


def _liger(device: str) -> Callable[..., Tensor]:
    _needs_gpu(device)
    loss = _import("liger_kernel.transformers", "LigerCrossEntropyLoss", "liger-kernel")
    return _of_rows(lambda z, y, softcap: loss(reduction="none", softcap=softcap)(z, y))


def _quack(device: str) -> Callable[..., Tensor]:
    _needs_gpu(device)
    ce = _import("quack", "cross_entropy", "quack-kernels")
    how: dict[str, Any] = {"ignore_index": IGNORE, "reduction": "none"}
    return _of_rows(lambda z, y, softcap: ce(softcapped(z, softcap), y, **how))


def _flash(device: str) -> Callable[..., Tensor]:
    _needs_gpu(device)
    ce = _import("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", "flash-attn")
    return _of_rows(lambda z, y, softcap: ce(softcapped(z, softcap), y, ignore_index=IGNORE)[0])


def _torch_fused(case: Case) -> Callable[..., Tensor]:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Absent("pip install 'torch>=2.13'")
    _needs_no_softcap(case)
    return _of_rows(lambda h, w, y, _: function(h, w, y, reduction="none"))


def _trl_chunked(scored_only: bool) -> Callable[..., Tensor]:
    kernel = _import("trl.kernels", "ChunkedLogProbFunction", "trl>=1.16")

    def nll(h, w, y, softcap):
        mask = y != IGNORE
        rows = (h[mask], w, None, y[mask]) if scored_only else (h, w, None, y.clamp(min=0))
        logp = kernel.apply(*rows, 1.0, 32768, softcap, 1.0, ())[0]
        picked = logp if scored_only else logp[mask]
        return -logp.new_zeros(mask.shape).masked_scatter(mask, picked)

    return _of_rows(nll)


def _cut(device: str) -> Callable[..., Tensor]:
    function = _import("cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy")
    how = {"reduction": "none", "impl": "cce" if device == "cuda" else "torch_compile"}
    return _of_rows(lambda h, w, y, softcap: function(h, w, y, softcap=softcap, **how))


def _liger_linear(device: str) -> Callable[..., Tensor]:
    _needs_gpu(device)
    loss = _import("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", "liger-kernel")
    return _of_rows(lambda h, w, y, softcap: loss(reduction="none", softcap=softcap)(w, h, y))


def _quack_linear(device: str) -> Callable[..., Tensor]:
    _needs_gpu(device)
    function = _import("quack.linear_cross_entropy", "linear_cross_entropy", "quack-kernels")
    how: dict[str, Any] = {"ignore_index": IGNORE, "reduction": "none"}
    return _of_rows(lambda h, w, y, _: function(h, w, y, **how))


def _needs_gpu(device: str) -> None:
    if device != "cuda":
        raise Absent("needs a GPU")


def _needs_no_softcap(case: Case) -> None:
    if case.shape.softcap is not None:
        raise Absent("has no softcap")


# --- whole losses ---


def _our_logits(case: Case, backend: str, inplace: bool = False) -> Provider:
    _mine(backend)
    forward = _is_forward(case)

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


def _our_linear(case: Case, backend: str) -> Provider:
    _mine(backend)
    forward = _is_forward(case)

    def call(x: Inputs) -> Tensor:
        options: dict[str, Any] = {"logit_softcap": x.softcap, "backend": backend}
        assert x.hidden is not None and x.weight is not None
        if forward:
            return dk.linear_sequence_logps(x.hidden, x.weight, x.labels, **options)
        return dk.fused_linear_dpo_loss(
            x.hidden, x.weight, x.labels, ref_logps=x.ref_logps, beta=BETA, **options
        ).loss

    return Provider(f"dpo-kernels {backend}", call, True)


def _liger_dpo(case: Case, device: str, with_reference: bool) -> Provider:
    make = _import("liger_kernel.chunked_loss", "LigerFusedLinearDPOLoss", "liger-kernel")
    if _is_forward(case):
        raise Absent("has no reference pass of its own")
    _needs_no_softcap(case)
    loss = make(use_ref_model=with_reference, compiled=device == "cuda", beta=BETA)

    def call(x: Inputs) -> Tensor:
        assert x.hidden is not None and x.weight is not None
        h, reference = x.hidden[:, :-1], {}
        if with_reference:  # it takes no log-probs: the reference is projected in the call
            reference = {"ref_input": h.detach(), "ref_weight": x.weight.detach()}
        return loss(x.weight, h, x.labels[:, 1:], **reference)[0]

    name = "Liger DPO" + ("" if with_reference else " without reference")
    return Provider(name, call, reference="policy" if with_reference else "none")


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
