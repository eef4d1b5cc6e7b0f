"""A run that writes checkpoints, and one that goes on from them: what is kept, found and put back.

A resumed run loads model and data as it did at first, and compares them with what its checkpoint
belongs to. Weights and everything else that steps change are then put back (`state`). The
reference is read, because the trained weights cannot give it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data import Limits, StreamedPairs, TokenRow
from ..models.references import needs_reference
from .checkpoints import (
    Checkpoints,
    check_space,
    find,
    newest,
    read_tensors,
    read_values,
    reason,
    run_of,
)
from .config import DPOTrainConfig, UserError
from .identity import differences
from .metrics import MetricsFile, read_metrics
from .model import Policy
from .order import step_indices, steps_of, visited
from .ranks import ALONE, Ranks
from .reference import PairData, Referee, Reference
from .state import TrainingState, load_reference, save_reference
from .step_loss import Mismatched


@dataclass
class Resumed:
    """A checkpoint to go on from."""

    path: Path
    values: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.values["progress"]["step"])

    def check(self, now: Mapping[str, Any]) -> None:
        """`UserError` with every difference between its run and this one."""
        with self._read():
            found = differences(self.values["identity"], now)
        if found:
            raise UserError(
                f"resume_from_checkpoint: {self.path} is of another run: {'; '.join(found)}"
            )

    def restore(self, state: TrainingState) -> None:
        what = f"resume_from_checkpoint: {self.path}"
        tensors = read_tensors(self.path, state.shards_like)
        with self._read():
            state.restore(tensors, self.values, what)

    @contextlib.contextmanager
    def _read(self) -> Iterator[None]:
        """A state.json that somebody changed is his to mend."""
        try:
            yield
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"resume_from_checkpoint: {self.path}: state.json cannot be read: {reason(error)}"
            ) from error


def resumed_from(
    config: DPOTrainConfig, version: str, say: Callable[[str], None]
) -> Resumed | None:
    """What `resume_from_checkpoint` asks for; None where a run is to start from its beginning."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "true":
        path = find(Path(wanted).expanduser())
    else:
        if config.output_dir is None:
            raise UserError(
                "resume_from_checkpoint=true goes on in output_dir: pass --output_dir FOLDER"
            )
        found = newest(Path(config.output_dir) / "checkpoints")
        if found is None:
            say(f"no checkpoint in {config.output_dir}: the run starts from its beginning")
            return None
        path = found
    return Resumed(path, read_values(path, version))


@dataclass
class Keeper:
    """When checkpoints are written, with what besides the training state."""

    checkpoints: Checkpoints | None
    every: int
    values: dict[str, Any]  # identity, version, and what the job found before training
    resumed: Resumed | None = None
    saved: int = -1  # the last step of a save

    @classmethod
    def of(
        cls,
        folder: Path,
        config: DPOTrainConfig,
        values: dict[str, Any],
        resumed: Resumed | None,
        ranks: Ranks = ALONE,
    ) -> Keeper:
        """The keeper of a run's folder; to a resumed run its checkpoint is the newest."""
        checkpoints = None
        if config.save_steps:
            checkpoints = Checkpoints(folder / "checkpoints", config.save_total_limit, ranks)
        keeper = cls(checkpoints, config.save_steps, values, resumed)
        if resumed and checkpoints and run_of(resumed.path) == folder.absolute():
            if ranks.first:
                checkpoints.drop_after(resumed.step)
            keeper.saved = resumed.step
        return keeper

    def save(self, state: TrainingState, metrics_rows: int, wait: bool = False) -> None:
        """Write the state unless this step is written already."""
        if self.checkpoints is None:
            return
        step = state.progress.step
        if step != self.saved:
            values = {**self.values, "metrics_rows": metrics_rows, **state.values()}
            self.checkpoints.save(step, state.tensors(), values)
            self.saved = step
        if wait:
            self.checkpoints.finish()

    def due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0

    def finish(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.finish()


def check_room(
    policy: Policy, config: DPOTrainConfig, folder: Path, say: Callable[[str], None]
) -> None:
    """Model and checkpoints (weights, and up to two moments of each) fit on the disk."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in policy.model.parameters()]
    trained = sum(size for size, grad in sizes if grad)
    each = trained * (1 + {"sgd": 0, "rmsprop": 1, "adagrad": 1}.get(config.optim, 2))
    many = config.save_total_limit or max(config.max_steps, 0) // config.save_steps + 1
    warning = check_space(folder, each, many, sum(size for size, _ in sizes))
    if warning:
        say(warning)


def metrics_of(folder: Path, resumed: Resumed | None, ranks: Ranks = ALONE) -> MetricsFile:
    """A run's metrics; of a resumed one those that its checkpoint knew."""
    file = folder / "metrics.jsonl"
    if resumed is None:
        return MetricsFile(file, written=ranks.first)
    source = run_of(resumed.path) / "metrics.jsonl"

    def before() -> list[dict[str, Any]]:
        try:
            return read_metrics(source, resumed.values["metrics_rows"])
        except (OSError, ValueError) as error:
            raise UserError(
                f"resume_from_checkpoint: {source} cannot be read: {reason(error)}. It has the "
                "lines of the steps before; an empty file in its place goes on without them"
            ) from None

    rows = ranks.first_does(before)
    return MetricsFile(file, rows, ranks.first)


def fine_tuned_first(config: DPOTrainConfig) -> bool:
    """Whether the reference is the policy behind supervised steps of the same run."""
    own = config.sft_file is not None and config.sft_steps != 0
    mixed_only = config.sft_steps is None and bool(config.sft_rows)
    return config.model_name_or_path is None or (own and not mixed_only)


def references(
    referee: Referee,
    pairs: Sequence[TokenRow],
    held_out: Sequence[TokenRow],
    folder: Path,
    resumed: Resumed | None,
) -> tuple[PairData, PairData | None]:
    """The pairs with what the reference gives to them: computed, or as the run kept it."""
    config = referee.config
    live = isinstance(pairs, StreamedPairs) or config.sync_ref_model
    # Of a resumed run nothing is put back yet: the policy is still the one it started from.
    kept: dict[str, Reference] | None = None
    if (
        resumed is not None
        and not live
        and needs_reference(config.loss_options())
        and not referee.stays
    ):
        kept = referee.policy.ranks.first_does(lambda: load_reference(resumed.path.parent))
    scored: dict[str, Reference | None] = {}

    def of(name: str, rows: Sequence[TokenRow], what: str, used: list[int] | None) -> PairData:
        if live:
            return referee.data(rows, what, live=True)
        if kept is None:
            data = referee.data(rows, what, used)
        else:
            data = PairData(rows, _kept(referee, kept.get(name, Reference()), rows, used))
        if isinstance(data.reference, Reference):
            scored[name] = data.reference
        return data

    used = None if live else visited(len(pairs), config)
    data = of("training", pairs, "training pairs", used)
    evaluated = of("held out", held_out, "held-out pairs", None) if held_out else None
    if config.compares_completions:
        limits = [config.max_length, Limits.of(referee.policy.model.config).positions]
        limit = min((x for x in limits if x is not None), default=None)
        asked = Mismatched(pairs, limit)
        steps = step_indices(len(pairs), config, steps_of(len(pairs), config))
        keys = sorted({key for indices, _ in steps for key in asked.keys(indices)})
        name = "mismatched completions"
        data = replace(data, mismatched=of("mismatched", asked, name, keys))
        if evaluated is not None:
            asked = Mismatched(held_out, limit)
            keys = asked.keys(range(len(held_out)))
            found = of("held out, mismatched", asked, f"held-out {name}", keys)
            evaluated = replace(evaluated, mismatched=found)
    referee.done()
    if config.save_steps and config.max_steps and scored:
        ranks = referee.policy.ranks
        ranks.first_does(lambda: save_reference(folder / "checkpoints", scored))
    return data, evaluated


def _kept(
    referee: Referee, kept: Reference, rows: Sequence[TokenRow], used: list[int] | None
) -> Reference:
    """What a run kept of the reference, and what it asks for beyond that."""
    missing = [i for i in (range(len(rows)) if used is None else used) if i not in kept.chosen]
    if not missing:
        return kept
    if fine_tuned_first(referee.config):
        raise UserError(
            f"max_steps: {referee.config.max_steps} asks for pairs that the run did not score "
            "before it began"
        )
    more = referee.data(rows, "more pairs", missing).reference
    assert isinstance(more, Reference)
    return kept.beside(more)
