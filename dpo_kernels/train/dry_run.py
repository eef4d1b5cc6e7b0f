"""`dpo-kernels train --dry_run`: what a run would do and take, without training or writing.

    options -> model and data -> batches -> memory -> two steps at learning rate 0 -> time

The rows that would be left out are reported as in a run. What cannot be done is a `UserError`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data import ScoredBatch, TokenRow, embedded
from ..data.batches import padded_tokens
from .compare import timed
from .config import DPOTrainConfig, UserError, refusals
from .console import Console
from .fit import ADVICE, available, device_of, shown, step_memory
from .groups import learned_groups
from .job import Job, check_options, foreseen, resolve
from .machine import peak_memory
from .model import Policy
from .optim import Stepper
from .order import step_indices, total_steps, window_of
from .reference import PairData, Referee, Reference
from .start import refuse_many_processes
from .step_batches import batches_of
from .step_loss import chosen_tokens, loss_of

_SAMPLED = 64  # batches whose layout is counted


def dry_run(options: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Report what the job that `options` describe would do; returns the numbers.

    Raises `UserError` where it would be refused or cannot fit, `DataError` for its data.
    """
    refuse_all("--dry_run", options, console)
    config, own = resolve(options)
    check_options(config, own)
    return foreseen(_DryRun, config, own, console).run()


def refuse_all(what: str, options: Mapping[str, Any], console: Console) -> None:
    """`UserError` for options that are refused, behind a line for each of them."""
    refuse_many_processes(what)
    if refused := refusals(options):
        for text in refused:
            console.say(f"refused: {text}")
        raise UserError(f"{len(refused)} option(s) are refused; the first: {refused[0]}")


class _DryRun(Job):
    """Loads what a run loads; its folder is checked and never made."""

    def _run(self) -> dict[str, Any]:
        config = self.config
        torch.manual_seed(config.seed)
        room = available(device_of(config))
        with contextlib.nullcontext() if self.own else embedded.folder() as source:
            policy, pairs, held_out = self._loaded(source)
        self.rows.conversations(policy)
        self._refuse(policy, pairs, held_out)
        learned_groups(config, policy.device, pairs, self.console.say)
        if config.max_steps == 0:
            return self._evaluation(held_out)
        counts = self._counts(policy, pairs, held_out)
        longest = max(_micro_batches(pairs, config), key=lambda b: _tokens(pairs, b))
        memory = self._memory(policy, pairs, longest, room)
        return {**counts, **memory, **self._times(policy, pairs, held_out, counts)}

    def _evaluation(self, held_out: Sequence[TokenRow]) -> dict[str, Any]:
        """Of a run that trains nothing."""
        tokens = sum(_size(p) for p in held_out)
        self.console.say(
            f"\n{len(held_out)} held-out {self.config.noun} to evaluate, {tokens} tokens; "
            f"{self.left_out.summary()}\n\ndry run: nothing was evaluated, nothing was written"
        )
        left_out = self.left_out.counts()
        return {"held_out_pairs": len(held_out), "steps": 0, "tokens": 0, "left_out": left_out}

    def _counts(
        self, policy: Policy, pairs: Sequence[TokenRow], held_out: Sequence[TokenRow]
    ) -> dict[str, Any]:
        """Batches and tokens of the whole run, and what the layout saves."""
        config, say = self.config, self.console.say
        sizes = [_size(p) for p in pairs]
        lengths = sorted(len(s.ids) for p in pairs for s in p.sequences)
        per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        steps = total_steps(len(pairs), per_step, config)
        tokens = sum(
            sizes[i]
            for chosen, _ in step_indices(len(pairs), config, steps, window_of(pairs))
            for i in chosen
        )
        say(
            f"\n{len(pairs)} {config.noun} to train on, {len(held_out)} held out; "
            f"{self.left_out.summary()}"
        )
        for remark in self.left_out.remarks():
            say(f"data: {remark}")
        prompts = sum(len(p.prompt) * len(p.sequences) for p in pairs) / max(sum(sizes), 1)
        say(
            f"tokens of a sequence: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}; "
            f"prompts are {prompts:.0%} of them"
        )
        say(
            f"{steps} optimizer steps of {per_step} {config.noun} "
            f"({config.per_device_train_batch_size} a batch), {tokens / steps:.0f} tokens each, "
            f"{tokens} in all"
        )
        computed, padded = self._layout(policy, pairs)
        saved = 1 - computed / padded
        say(f"layout: {saved:.0%} of the positions of a padded batch are not computed")
        return {
            "pairs": len(pairs),
            "held_out_pairs": len(held_out),
            "steps": steps,
            "tokens": tokens,
            "longest": lengths[-1],
            "saved": saved,
            "left_out": self.left_out.counts(),
        }

    def _layout(self, policy: Policy, pairs: Sequence[TokenRow]) -> tuple[int, int]:
        """Positions that the trunk computes of a sample of batches, and padded ones of the same."""
        computed = padded = 0
        for indices in _micro_batches(pairs, self.config)[:_SAMPLED]:
            chunk = [pairs[i] for i in indices]
            computed += _positions(policy.batch(chunk))
            padded += padded_tokens(chunk)
        return computed, padded

    def _memory(
        self, policy: Policy, pairs: Sequence[TokenRow], longest: list[int], room: int | None
    ) -> dict[str, Any]:
        """The largest step's memory; `UserError` if it is more than there is."""
        parts = batches_of(longest, pairs, self.config, policy)
        part = max(parts, key=lambda p: _tokens(pairs, p))
        taken = step_memory(policy, policy.batch([pairs[i] for i in part]), self.config)
        say_memory(taken, room, policy.device, self.console.say)
        return {"memory": taken, "memory_free": room}

    def _times(
        self,
        policy: Policy,
        pairs: Sequence[TokenRow],
        held_out: Sequence[TokenRow],
        counts: dict[str, Any],
    ) -> dict[str, Any]:
        """The time of the run, from two steps at learning rate 0 over a batch of middling size."""
        config, say = self.config, self.console.say
        batches = sorted(_micro_batches(pairs, config), key=lambda b: _tokens(pairs, b))
        indices = batches[len(batches) // 2]
        quiet = Console(quiet=True)
        # No cache: what this run would find there is not what is to be timed.
        referee = Referee(policy, replace(config, reference_cache=None), quiet, self.own)
        began = time.perf_counter()
        data = referee.data(pairs, "", indices)
        forward = time.perf_counter() - began
        step = second_step(policy, lambda: _step(policy, data, indices, config))
        tokens = _tokens(pairs, indices)
        training = step * counts["tokens"] / tokens
        evaluated = sum(_size(p) for p in held_out)
        passes = 0 if not held_out else 3 + counts["steps"] // (config.eval_steps or 10**12)
        every = min(counts["tokens"], sum(_size(p) for p in pairs))
        scored = every if isinstance(data.reference, Reference) else 0
        scoring = forward / tokens * scored
        if forward < 1e-3 or data.reference is None:
            forward = step / 3
        rest = forward / tokens * evaluated * passes
        say(
            f"\ntime, guessed from two steps of {len(indices)} pairs ({step:.2f} s, "
            f"{tokens / step:.0f} tokens/s): {clock(training + scoring + rest)}"
        )
        say(f"  training {clock(training)}, reference {clock(scoring)}, evaluation {clock(rest)}")
        if not self.own or config.sft_file is not None:
            say("  supervised steps and samples are not in it")
        say(f"peak memory of these steps: {shown(peak_memory(policy.device))}")
        say("\ndry run: nothing was trained, nothing was written")
        return {"step_seconds": step, "seconds": training + scoring + rest}


def say_memory(
    taken: dict[str, int], room: int | None, device: torch.device, say: Callable[..., None]
) -> None:
    """The largest step's memory; `UserError` if it is more than there is."""
    need = sum(taken.values())
    say(f"\nmemory of the largest step on {device}, estimated:")
    for name, size in taken.items():
        say(f"  {name:<12}{shown(size):>12}")
    say(f"  {'together':<12}{shown(need):>12}" + (f" of {shown(room)} free" if room else ""))
    if room is not None and need > room:
        raise UserError(
            f"this run does not fit: its largest step takes about {shown(need)}, and "
            f"{device} has {shown(room)} free ({ADVICE})"
        )


def second_step(policy: Policy, step: Callable[[], None]) -> float:
    """Seconds of the second of two steps; `UserError` where there is no room for them."""
    try:
        return [timed(step, policy) for _ in range(2)][1]
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"this run does not fit: {first} ({ADVICE})") from None


def _step(policy: Policy, data: PairData, indices: list[int], config: DPOTrainConfig) -> None:
    """One optimizer step that changes no weight."""
    stepper, loss = Stepper(policy.model, at_rate_0(config), 1), loss_of(policy, config)
    chosen = chosen_tokens([data.pairs[i] for i in indices])
    total = torch.zeros((), device=policy.device)
    for part in batches_of(indices, data.pairs, config, policy):
        out, _ = loss(data, part, len(indices), chosen)
        assert out.loss is not None
        out.loss.backward()
        total = total + out.loss.detach()
    stepper.step(total, "the probe", [data.pairs[i].source for i in indices])


def at_rate_0(config: DPOTrainConfig) -> DPOTrainConfig:
    """The configuration of a step that changes no weight."""
    return replace(
        config,
        learning_rate=0.0,
        weight_decay=0.0,
        warmup_steps=0,
        lr_scheduler_type="constant",
        lr_scheduler_kwargs=None,
        check_first_step=False,  # which asks for weights that move
    )


def _micro_batches(pairs: Sequence[TokenRow], config: DPOTrainConfig) -> list[list[int]]:
    """The batches of the first pass over the pairs (of fewer, if the run has fewer steps)."""
    micro = config.per_device_train_batch_size
    per_step = micro * config.gradient_accumulation_steps
    steps = min(total_steps(len(pairs), per_step, config), -(-len(pairs) // per_step))
    return [
        indices[start : start + micro]
        for indices, _ in step_indices(len(pairs), config, steps, window_of(pairs))
        for start in range(0, len(indices), micro)
    ]


def _tokens(pairs: Sequence[TokenRow], indices: Sequence[int]) -> int:
    return sum(_size(pairs[i]) for i in indices)


def _size(row: TokenRow) -> int:
    """Tokens of the sequences of a row, the prompt in each."""
    return sum(len(s.ids) for s in row.sequences)


def _positions(batch: ScoredBatch) -> int:
    return sum(call.input_ids.numel() for call in batch.calls)


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{int(minutes // 60)} h {int(minutes % 60)} min"
