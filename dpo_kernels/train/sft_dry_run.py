"""`dpo-kernels sft --dry_run`: what a supervised run would do and take; nothing is written.

As `dry_run.py` for pairs: counts, the memory of the largest batch, and a time from two steps at
learning rate 0 over a batch of middling size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data import TokenSequence, make_sequence_batch
from .console import Console
from .dry_run import at_rate_0, clock, refuse_all, say_memory, second_step
from .fit import available, device_of, shown, step_memory
from .job import check_options, foreseen
from .machine import peak_memory
from .model import Policy
from .optim import Stepper
from .order import step_indices, steps_of
from .sft import nll_gradients
from .sft_job import SFTJob, resolve_sft


def sft_dry_run(options: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Report what the supervised run that `options` describe would do; returns the numbers.

    Raises `UserError` where it would be refused or cannot fit, `DataError` for its data.
    """
    refuse_all("sft --dry_run", options, console)
    config = resolve_sft(options)
    check_options(config, True)
    return foreseen(_SFTDryRun, config, True, console).run()


class _SFTDryRun(SFTJob):
    """Loads what a run loads; its folder is checked and never made."""

    def _run(self) -> dict[str, Any]:
        config, say = self.config, self.console.say
        torch.manual_seed(config.seed)
        room = available(device_of(config))
        policy = self._users_model()
        rows, held_out = self._rows(policy)
        self._refuse(policy, rows, held_out)
        steps = steps_of(len(rows), config)
        chosen = [indices for indices, _ in step_indices(len(rows), config, steps)]
        tokens = sum(len(rows[i].ids) for indices in chosen for i in indices)
        scored = sum(rows[i].num_scored for indices in chosen for i in indices)
        lengths = sorted(len(r.ids) for r in rows)
        say(f"\n{len(rows)} rows to train on, {len(held_out)} held out; {self.left_out.summary()}")
        for remark in self.left_out.remarks():
            say(f"data: {remark}")
        say(f"tokens of a row: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")
        per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        say(
            f"{steps} optimizer steps of {per_step} rows ({config.per_device_train_batch_size} a "
            f"batch), {tokens / max(steps, 1):.0f} tokens each, {tokens} in all, {scored} of them "
            "scored"
        )
        batches = sorted(self._batches(chosen or [list(range(len(rows)))]), key=_size(rows))
        largest = [rows[i] for i in batches[-1]]
        memory = self._memory(policy, largest, room)
        seconds = self._times(policy, rows, batches[len(batches) // 2], tokens, held_out, steps)
        return {
            "rows": len(rows),
            "held_out_rows": len(held_out),
            "steps": steps,
            "tokens": tokens,
            "longest": lengths[-1],
            "left_out": self.left_out.counts(),
            "memory": memory,
            "memory_free": room,
            "seconds": seconds,
        }

    def _batches(self, steps: Sequence[list[int]]) -> list[list[int]]:
        micro = self.config.per_device_train_batch_size
        return [s[at : at + micro] for s in steps for at in range(0, len(s), micro)]

    def _memory(
        self, policy: Policy, rows: list[TokenSequence], room: int | None
    ) -> dict[str, int]:
        # The head's estimate is of pairs: an odd row counts with itself.
        even = rows if len(rows) % 2 == 0 else [*rows, rows[-1]]
        sharing = replace(policy.sharing, mode="padded")
        taken = step_memory(
            policy, make_sequence_batch(even, sharing, policy.pad_id), self.config, "sft"
        )
        say_memory(taken, room, policy.device, self.console.say)
        return taken

    def _times(
        self,
        policy: Policy,
        rows: Sequence[TokenSequence],
        indices: list[int],
        tokens: int,
        held_out: Sequence[TokenSequence],
        steps: int,
    ) -> float:
        """Seconds of the run, from two steps over the rows `indices`."""
        config, say = self.config, self.console.say
        group = [rows[i] for i in indices]
        stepper = Stepper(policy.model, at_rate_0(config), 1)

        def step() -> None:
            loss = nll_gradients(policy, group, config.per_device_train_batch_size)
            stepper.step(loss, "the probe", [r.source for r in group])

        took = second_step(policy, step)
        here = sum(len(r.ids) for r in group)
        training = took / here * tokens
        passes = 0 if not held_out else 2 + steps // (config.eval_steps or 10**12)
        rest = took / 3 / here * sum(len(r.ids) for r in held_out) * passes
        say(
            f"\ntime, guessed from two steps of {len(group)} rows ({took:.2f} s, "
            f"{here / took:.0f} tokens/s): {clock(training + rest)}"
        )
        say(f"  training {clock(training)}, evaluation {clock(rest)}; samples are not in it")
        say(f"peak memory of these steps: {shown(peak_memory(policy.device))}")
        say("\ndry run: nothing was trained, nothing was written")
        return training + rest


def _size(rows: Sequence[TokenSequence]) -> Any:
    """Padded positions of a batch."""
    return lambda indices: len(indices) * max(len(rows[i].ids) for i in indices)
