"""Check every provider against float64, then time all of a case in turns, beside their floor.

Providers take turns in one process, in a new random order every round, on random data that is drawn
anew every round: other work on the machine meets them all alike, and none always runs in the memory
that the same other one has just freed. The floor takes its turns too: a copy of the logits for what
moves bytes, the bare matrix products for the linear head. On GPUs calls are timed by device events
behind a flushed cache, and the device is kept busy while the host enqueues; suites that wait for
launches let it wait.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import providers as _providers
from .cases import DTYPES, Case
from .providers import BETA, IGNORE, Absent, Inputs, Provider, eager_linear_sums, eager_sums

# A gradient further off than this, relative and in norm, is wrong. Rounded log-probs move a pair's
# coefficient as they move its log-ratio, so what they are allowed is added: at most to the second,
# since a gradient that is missing or of the wrong sign or pair is off by 1 and more.
GRADIENT_ERROR = (0.2, 0.7)
HOST_BOUND = ("pair loss", "small batch", "training step")
WITH_LOGITS = ("logits forward", "logits fwd+bwd", "small batch")


@dataclass
class Measurement:
    """One provider of one case. Seconds are those of each round; without any it was not timed."""

    case: Case
    provider: str
    ours: bool = False
    seconds: list[float] = field(default_factory=list)
    floor: float | None = None  # seconds
    error: float | None = None  # of loss or log-probs, absolute, against float64
    gradient_error: float | None = None  # relative, in norm
    peak_bytes: int | None = None  # above the inputs
    note: str = ""  # why it was not timed

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, p: int) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, len(ordered) * p // 100)]


def measure(
    case: Case, device: str, rounds: int, only: str = "", without: tuple[str, ...] = ()
) -> list[Measurement]:
    """All providers of a case, or those whose name contains `only` and is not in `without`."""
    inputs = make_inputs(case, device)
    truth = functools.cache(lambda reference: exact(inputs, reference))
    measured, able = [], []
    for name, make in _providers.providers(case, device):
        if only not in name or name in without:
            continue
        result = Measurement(case, name)
        measured.append(result)
        try:
            provider = make()
        except Absent as why:
            result.note = f"absent: {why}"
            continue
        result.ours = provider.ours
        try:
            check(provider, inputs, result, truth)
        except Exception as error:  # a peer's failure is a result, not the end of the run
            if provider.ours:
                raise
            result.note = f"failed: {type(error).__name__}: {str(error)[:200]}"
            continue
        if result.note == "":
            able.append((provider, result))
    floor = _floor_call(inputs)
    calls = {id(result): _timed_call(provider, inputs) for provider, result in able}
    floors: list[float] = []
    order = random.Random(case.name)
    for turn in range(rounds + 1):
        refresh(inputs)
        timed = [] if floor is None else [(floors, floor, lambda: None)]
        timed += [(r.seconds, *calls[id(r)]) for _, r in able]
        order.shuffle(timed)
        for seconds, call, before in timed:
            elapsed = clock(call, before, device, case.suite in HOST_BOUND)
            if turn:
                seconds.append(elapsed)
    for _, result in able:
        if floors:
            result.floor = statistics.median(floors) * _floor_copies(case)
    return measured


def make_inputs(case: Case, device: str) -> Inputs:
    R, T, dtype = 2 * case.pairs, case.length, DTYPES[case.dtype]
    ref = torch.randn(R, device=device)
    if case.suite == "pair loss":
        logps = torch.randn(R, device=device).requires_grad_()
        return Inputs(case, torch.empty(0), ref, logps=logps)
    V, H = case.shape.vocabulary, case.shape.hidden
    labels = torch.randint(0, V, (R, T + 1), device=device)
    labels[:, : -max(1, round(T * case.fraction))] = IGNORE
    inputs = Inputs(case, labels, ref)
    gradient = case.suite not in ("logits forward", "linear reference")
    if case.suite == "training step":
        inputs.model, inputs.optimizer = _small_llama(case, device, dtype)
    elif case.suite in WITH_LOGITS:
        inputs.logits = torch.empty(R, T + 1, V, device=device, dtype=dtype)
        inputs.logits.requires_grad_(gradient)
    else:
        inputs.hidden = torch.empty(R, T + 1, H, device=device, dtype=dtype)
        inputs.hidden.requires_grad_(gradient)
        inputs.weight = torch.empty(V, H, device=device, dtype=dtype)
        inputs.weight.requires_grad_(case.suite == "linear trained")
    refresh(inputs)
    return inputs


def refresh(x: Inputs) -> None:
    """New random numbers, and a reference near the policy, so that the loss does not saturate."""
    with torch.no_grad():
        if x.logps is not None:
            x.logps.normal_(-50, 10)
            x.ref_logps.copy_(x.logps + torch.randn_like(x.logps))
            return
        if x.logits is not None:
            x.logits.normal_(0, 2)
        if x.hidden is not None and x.weight is not None:
            x.hidden.normal_()
            x.weight.normal_(0, x.hidden.shape[-1] ** -0.5)
        import dpo_kernels as dk

        if x.logits is not None:
            sums = dk.sequence_logps(x.logits, x.labels, logit_softcap=x.softcap)
        elif x.hidden is not None and x.weight is not None:
            sums = dk.linear_sequence_logps(x.hidden, x.weight, x.labels, logit_softcap=x.softcap)
        else:
            return
        x.ref_logps.copy_(sums + torch.randn_like(sums))


def _small_llama(case: Case, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Four layers of the model's width: the head is then the larger part, as in small models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    H = case.shape.hidden
    config = LlamaConfig(
        vocab_size=case.shape.vocabulary,
        hidden_size=H,
        intermediate_size=8 * H // 3,
        num_hidden_layers=4,
        num_attention_heads=H // 64,
        num_key_value_heads=H // 64,
    )
    model = LlamaForCausalLM(config)
    model.to(device=device, dtype=dtype)  # type: ignore[call-arg, arg-type]
    return model, torch.optim.AdamW(model.parameters(), lr=0.0)


def exact(x: Inputs, reference: str) -> tuple[Tensor, list[Tensor]]:
    """Loss (or log-probs) and gradients in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in x.leaves()]
    ref = x.ref_logps.double()
    if x.case.suite == "pair loss":
        value = _providers.pair_loss_wide(leaves[0], ref)
    else:
        if x.logits is not None:
            sums = eager_sums(leaves[0] if leaves else x.logits.double(), x.labels, x.softcap)
        else:
            assert x.hidden is not None and x.weight is not None
            hidden = leaves[0] if leaves else x.hidden.double()
            weight = leaves[1] if len(leaves) > 1 else x.weight.double()
            sums = eager_linear_sums(hidden, weight, x.labels, x.softcap)
        if x.case.suite in ("logits forward", "linear reference"):
            return sums.detach(), []
        if reference == "policy":
            ref = sums.detach()
        elif reference == "none":
            ref = torch.zeros_like(ref)
        value = _providers.pair_loss_wide(sums, ref)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def check(
    provider: Provider,
    x: Inputs,
    result: Measurement,
    truth: Callable[[str], tuple[Tensor, list[Tensor]]],
) -> None:
    """Errors against float64 into `result`, with a note where they make the provider wrong."""
    if x.case.suite == "training step":
        with torch.no_grad():
            import dpo_kernels as dk

            hidden = x.model.model(x.labels.clamp(min=0)).last_hidden_state.double()
            sums = dk.linear_sequence_logps(hidden, x.model.lm_head.weight.double(), x.labels)
            x.ref_logps.copy_(sums + torch.randn_like(sums))
            value = _providers.pair_loss_wide(sums, x.ref_logps.double())
        result.error = abs(float(provider.call(x)) - float(value))
    else:
        value, grads = truth(provider.reference)
        kept = x.logits.detach().clone() if provider.overwrites and x.logits is not None else None
        out = provider.call(x)
        result.error = float((out.detach().double() - value).abs().max())
        if grads:
            out.backward()
            pairs = zip(x.leaves(), grads, strict=True)
            errors = [(leaf.grad.double() - g).norm() / g.norm() for leaf, g in pairs]  # type: ignore[union-attr]
            result.gradient_error = float(max(errors))
            _forget(x)
        if kept is not None:
            x.logits.data.copy_(kept)  # type: ignore[union-attr]
    allowed, gradient_error = _allowed(x), result.gradient_error or 0.0
    least, most = GRADIENT_ERROR
    if not result.error <= allowed or not gradient_error < min(least + allowed, most):
        result.note = f"wrong: error {result.error:.1e}, of the gradient {gradient_error:.1e}"


def _allowed(x: Inputs) -> float:
    """The error that rounding each token's log-prob to the inputs' dtype gives; beyond it is wrong.

    bf16 log-probs, which are in use, are off by nats over a sequence: the error is shown.
    """
    size = float(x.ref_logps.abs().max()) + 1
    allowed = torch.finfo(DTYPES[x.case.dtype]).eps * 2 * size + 1e-5
    return allowed if x.case.suite in _FORWARD else BETA * allowed


_FORWARD = ("logits forward", "linear reference")


def _forget(x: Inputs) -> None:
    for leaf in x.leaves():
        leaf.grad = None


def _timed_call(provider: Provider, x: Inputs) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The call, and what restores its inputs outside the clock."""
    if x.case.suite in _FORWARD:

        def forward() -> Any:
            with torch.no_grad():
                return provider.call(x)

        return forward, lambda: None
    if x.case.suite == "training step":
        return lambda: provider.call(x), lambda: None
    kept = x.logits.detach().clone() if provider.overwrites and x.logits is not None else None

    def before() -> None:
        _forget(x)
        if kept is not None and x.logits is not None:
            # What the last turn left are gradients; any finite logits do for the time.
            x.logits.data.copy_(kept)

    return lambda: provider.call(x).backward(), before


def _floor_call(x: Inputs) -> Callable[[], Any] | None:
    """What moves the least bytes or multiplies the least: timed like a provider."""
    if x.logits is not None:
        source = x.logits.detach()
        target = torch.empty_like(source)
        target.copy_(source)
        return lambda: target.copy_(source)
    if x.hidden is not None and x.weight is not None:
        count = {"linear trained": 3, "linear frozen": 2}.get(x.case.suite, 1)
        scored = x.scored()[1]
        hidden, weight = x.hidden.detach(), x.weight.detach()

        def products() -> None:
            rows = hidden[:, :-1][scored]
            z = rows @ weight.T
            if count > 1:
                z @ weight
            if count > 2:
                z.T @ rows

        return products
    return None


def _floor_copies(case: Case) -> float:
    """The case's bytes, in copies of all logits (one read and one write)."""
    if case.suite not in WITH_LOGITS:
        return 1.0
    scored = case.scored / case.tokens if case.tokens else 1.0
    if case.suite == "logits forward":
        return scored / 2
    return (2 * scored + 1) / 2  # two reads of the scored rows, one write of all


def clock(
    call: Callable[[], Any], before: Callable[[], Any], device: str, host_bound: bool
) -> float:
    """Seconds of one call; `before` and the result's end are outside."""
    before()
    if device != "cuda":
        began = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - began
        del result
        return elapsed
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if host_bound:
        torch.cuda.synchronize()
    else:
        torch.empty(256 << 20, dtype=torch.uint8, device=device).zero_()  # past the L2 cache
        torch.cuda._sleep(1_000_000)
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3
