"""The training loop: batches in an order fixed by the seed, one guarded optimizer step at a time.

An optimizer step is `gradient_accumulation_steps` batches. Its loss is the mean over all of its
pairs: each batch passes `num_pairs=` (and `num_chosen_tokens=` for SFT terms) of the whole step, so
that unequal batches do not weigh unequally, and batch losses are shares that add up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dpo_kernels as dk

from ..data import ScoredBatch, TokenPair
from ..data.batches import laid_out_tokens, within_budget
from ..inputs.transfer import to_device
from ..models.attached import HeadOutput
from ..models.forward import PairTask, run_pairs
from ..models.step0 import WrongReference
from ..models.step0 import check_step0 as check_same
from ..models.structure import deterministic
from .config import DPOTrainConfig
from .console import Console
from .metrics import EVAL_ONLY, MetricsFile, PairMeter
from .model import Policy
from .optim import Stepper, TrainingError, epoch_order, total_steps
from .reference import PairData
from .whole_step import coupled, coupled_gradients


@dataclass(frozen=True)
class TrainResult:
    """What the loop did."""

    steps: int
    median_step_time: float  # seconds, the first step left out
    step0_loss: float
    step0_expected: float


class PairLoss:
    """The configured loss of batches of pairs."""

    def __init__(self, policy: Policy, config: DPOTrainConfig) -> None:
        # The module form, because beta-DPO keeps a running margin between batches.
        self.function = dk.FusedLinearDPOLoss(**config.loss_options())
        self.policy, self.uses_offset = policy, config.uses_offset
        self.per_token = config.ld_alpha is not None  # what the reference keeps

    def __call__(
        self, data: PairData, indices: Sequence[int], num_pairs: int, num_chosen_tokens: int
    ) -> tuple[HeadOutput, ScoredBatch]:
        """Loss of the pairs `indices` as a share of `num_pairs`, and their batch."""
        whole = {"num_pairs": num_pairs, "num_chosen_tokens": max(num_chosen_tokens, 1)}
        task = self.task(data, indices, whole)
        router_weight = self.policy.router_weight * len(indices) / num_pairs
        with self.policy.autocast():
            out = run_pairs(self.policy.model, {}, task, router_weight)
        assert task.batch is not None
        return out, task.batch

    def task(
        self, data: PairData, indices: Sequence[int], options: dict[str, Any] | None = None
    ) -> PairTask:
        """What the head is to make of the pairs `indices`."""
        pairs = [data.pairs[i] for i in indices]
        batch = self.policy.batch(pairs)
        return PairTask(
            batch.labels,
            self.reference(data, indices),
            {**(options or {}), **self.offset(pairs)},
            self.policy.fused,
            batch,
            self.per_token,
            self.function,
        )

    def reference(self, data: PairData, indices: Sequence[int]) -> Tensor | None:
        return data.reference.of(indices, self.policy.device) if data.reference else None

    def offset(self, pairs: list[TokenPair]) -> dict[str, Tensor]:
        """The options that come with the rows: margins for ODPO, weights and betas of pairs."""
        found: dict[str, list[float]] = {}
        if self.uses_offset:
            found["offset"] = [p.offset or 0.0 for p in pairs]
        if any(p.weight is not None for p in pairs):
            found["weights"] = [1.0 if p.weight is None else p.weight for p in pairs]
        if any(p.beta is not None for p in pairs):
            found["beta"] = [p.beta or self.function.options["beta"] for p in pairs]
        return {k: to_device(torch.tensor(v), self.policy.device) for k, v in found.items()}


def chosen_tokens(pairs: Sequence[TokenPair]) -> int:
    """Scored tokens of the chosen completions."""
    return sum(p.sequences[0].num_scored for p in pairs)


@torch.no_grad()
def evaluate(
    policy: Policy, data: PairData, config: DPOTrainConfig, console: Console, what: str
) -> dict[str, float]:
    """Loss and metrics of held-out pairs, names prefixed `eval_`."""
    loss = PairLoss(policy, config)
    loss.function.eval()
    meter, n, size = PairMeter(), len(data.pairs), config.per_device_eval_batch_size
    tokens = chosen_tokens(data.pairs)
    starts = range(0, n, size)
    began = time.perf_counter()
    with deterministic(policy.model):
        for start in console.progress(starts, f"evaluation {what}", len(starts), "batches"):
            out, _ = loss(data, range(start, min(start + size, n)), n, tokens)
            meter.add(out, config.beta if data.reference else None)
    result = meter.result()
    result["runtime"] = time.perf_counter() - began
    return {f"eval_{name}": value for name, value in result.items()}


@torch.no_grad()
def check_step0(
    policy: Policy, data: PairData, config: DPOTrainConfig, indices: Sequence[int]
) -> tuple[float, float]:
    """(loss, loss at zero log-ratios) of one batch before the first step; they must be equal.

    The policy is the reference and its noise is off, so every log-ratio is zero: for `sigmoid` the
    loss is log 2. Anything else means another reference, or kernels that disagree.
    """
    loss = PairLoss(policy, config)
    loss.function.eval()
    with deterministic(policy.model), policy.autocast():
        out = run_pairs(policy.model, {}, loss.task(data, indices), 0.0, first=True)
    assert out.loss is not None and out.zero_loss is not None
    assert out.rewards is not None and out.pair_logps is not None
    if data.reference:
        options = config.loss_options()
        try:
            check_same(
                out.rewards,
                out.pair_logps,
                options,
                policy.dtype,
                loss=out.loss,
                zero_loss=out.zero_loss,
            )
        except WrongReference as error:
            raise TrainingError(str(error)) from None
    return float(out.loss), float(out.zero_loss)


def step_indices(n: int, config: DPOTrainConfig, steps: int) -> Iterator[tuple[list[int], float]]:
    """(indices of the step's pairs, epochs done after it), a function of the seed alone."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    shuffle = config.train_sampling_strategy == "random"
    done = epoch = 0
    while True:
        order = epoch_order(n, config.seed, epoch, shuffle)
        for start in range(0, n, per_step):
            if done == steps:
                return
            chunk = order[start : start + per_step]
            done += 1
            yield chunk, epoch + (start + len(chunk)) / n
        epoch += 1


# On a CPU a batch is run in parts of about this many tokens: as fast (the matrix products are large
# enough), and only one part's activations are alive at a time. Results differ by rounding alone.
CPU_PART_TOKENS = 1024


def parts_of(
    indices: list[int],
    pairs: Sequence[TokenPair],
    config: DPOTrainConfig,
    device: torch.device,
    whole: bool = False,
) -> list[list[int]]:
    """One batch cut into the parts that run forward and backward on their own.

    Losses that couple the pairs of a batch (AOT sorts over it) need it whole, as a router's loss
    does (`whole`); so does a GPU.
    """
    if whole or coupled(config) or device.type != "cpu":
        return [indices]
    parts: list[list[int]] = []
    tokens = CPU_PART_TOKENS
    for i in indices:
        pair = pairs[i]
        size = len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
        if tokens + size > CPU_PART_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(i)
        tokens += size
    return parts


def _gradients(
    loss: PairLoss, data: PairData, indices: list[int], config: DPOTrainConfig, meter: PairMeter
) -> tuple[Tensor, int]:
    """Accumulate the gradients of one optimizer step's pairs; (loss, tokens) of the step."""
    beta = config.beta if data.reference else None
    num_chosen = chosen_tokens([data.pairs[i] for i in indices])
    batches = batches_of(indices, data.pairs, config, loss.policy)
    if coupled(config) and len(batches) > 1:
        out, tokens = coupled_gradients(loss, data, indices, batches, num_chosen)
        meter.add(out, beta)
        assert out.loss is not None
        return out.loss, tokens
    total, tokens = torch.zeros((), device=loss.policy.device), 0
    for part in batches:
        out, batch = loss(data, part, len(indices), num_chosen)
        assert out.loss is not None
        out.loss.backward()
        total = total + out.loss.detach()
        meter.add(out, beta)
        tokens += batch.num_tokens
        del out, batch  # the graph's last references: free it before the next forward
    return total, tokens


def batches_of(
    indices: list[int], pairs: Sequence[TokenPair], config: DPOTrainConfig, policy: Policy
) -> list[list[int]]:
    """One optimizer step's pairs in the batches that run forward and backward on their own.

    By number of pairs, or up to a budget of tokens; the step's loss is the same.
    """
    budget = config.max_tokens_per_batch
    if budget is not None:
        sharing = policy.sharing
        return within_budget(indices, lambda i: laid_out_tokens(pairs[i], sharing), budget)
    micro, router = config.per_device_train_batch_size, bool(policy.router_weight)
    groups = [indices[start : start + micro] for start in range(0, len(indices), micro)]
    return [
        part for group in groups for part in parts_of(group, pairs, config, policy.device, router)
    ]


def visited(n: int, config: DPOTrainConfig) -> list[int]:
    """The pairs out of `n` that the run's steps visit."""
    steps = _steps(n, config)
    return sorted({i for indices, _ in step_indices(n, config, steps) for i in indices})


def _steps(n: int, config: DPOTrainConfig) -> int:
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return total_steps(n, per_step, config)


def train(
    policy: Policy,
    data: PairData,
    held_out: PairData | None,
    config: DPOTrainConfig,
    metrics: MetricsFile,
    console: Console,
) -> TrainResult:
    """Train the policy in place; metrics every `logging_steps`.

    Raises `TrainingError` on a loss or gradient that is not finite, naming the pairs of the step,
    or if the policy is not the reference before the first step.
    """
    n = len(data.pairs)
    steps = _steps(n, config)
    stepper = Stepper(policy.model, config, steps)
    loss = PairLoss(policy, config)
    first = next(step_indices(n, config, steps))[0][: config.per_device_train_batch_size]
    step0, expected = check_step0(policy, data, config, first)
    console.say(f"step 0: loss {step0:.6f}, at zero log-ratios {expected:.6f}")
    meter, logged, tokens_seen, tokens_logged = PairMeter(), 0, 0, 0
    times: list[float] = []
    plan = step_indices(n, config, steps)
    for step, (indices, epoch) in enumerate(
        console.progress(plan, "training", steps, "steps", lines=False), start=1
    ):
        began = time.perf_counter()
        total, tokens = _gradients(loss, data, indices, config, meter)
        tokens_seen += tokens
        tokens_logged += tokens
        extra = stepper.step(total, f"step {step}", [data.pairs[i].source for i in indices])
        times.append(time.perf_counter() - began)
        if stepper.warning:
            console.say(stepper.warning)
            stepper.warning = ""
        logged += 1
        if step % config.logging_steps == 0 or step == steps:
            took = sum(times[-logged:])
            row = {k: v for k, v in meter.result(logged).items() if k not in EVAL_ONLY}
            row |= {
                "step": step,
                "epoch": epoch,
                **extra,
                "num_tokens": tokens_seen,
                "step_time": took / logged,
                "tokens_per_s": tokens_logged / took,
                "pairs_per_s": meter.pairs / took,
            }
            metrics.write(row)
            shown = {"loss": f"{row['loss']:.4f}", "margin": f"{row['rewards/margins']:.3f}"}
            console.postfix(**shown)
            console.note(
                f"step {step}/{steps}: loss {row['loss']:.4f}, margin "
                f"{row['rewards/margins']:.4f}, accuracy {row['rewards/accuracies']:.3f}, "
                f"{row['step_time']:.2f} s a step"
            )
            meter, logged, tokens_logged = PairMeter(), 0, 0
        if held_out and config.eval_steps and step % config.eval_steps == 0 and step < steps:
            quiet = Console(quiet=True)
            metrics.write(
                {"step": step, "epoch": epoch, **evaluate(policy, held_out, config, quiet, "")}
            )
    rest = sorted(times[1:] or times)
    return TrainResult(steps, rest[len(rest) // 2], step0, expected)
