"""Where metrics go beside metrics.jsonl: trackio, TensorBoard, W&B, behind one small interface.

Each is imported only when `report_to` names it. A service that fails while a run trains is told
once and left out: the run's own file has every line.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from .config import DPOTrainConfig, UserError


class Sink(Protocol):
    """One place that takes lines of metrics."""

    def write(self, row: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """What a service is told of a run."""

    folder: Path
    config: DPOTrainConfig
    id: str  # of the run and of those that resume it
    step: int  # it goes on from


class TensorBoard:
    """Event files in the run's folder, under `tensorboard/`."""

    needs = "tensorboard"

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a resumed run's first part wrote behind its checkpoint is hidden.
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def write(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of W&B; a resumed run is the same one there."""

    needs = "wandb"

    def __init__(self, run: Run) -> None:
        import wandb

        self.run = wandb.init(
            project=run.config.project,
            name=run.config.run_name or run.folder.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=asdict(run.config),
        )

    def write(self, row: Mapping[str, float], step: int) -> None:
        self.run.log({**row, "train/global_step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, kept on this machine unless trackio is told otherwise."""

    needs = "trackio"

    def __init__(self, run: Run) -> None:
        import trackio

        self.module = trackio
        trackio.init(
            project=run.config.project,
            name=run.config.run_name or run.folder.name,
            config=asdict(run.config),
            resume="allow",
        )

    def write(self, row: Mapping[str, float], step: int) -> None:
        self.module.log(dict(row), step=step)

    def close(self) -> None:
        self.module.finish()


SINKS: dict[str, Any] = {"trackio": Trackio, "tensorboard": TensorBoard, "wandb": Wandb}


def check_sinks(names: list[str]) -> None:
    """`UserError` for a service that is unknown or not installed, before anything is loaded."""
    for name in names:
        if name not in SINKS:
            raise UserError(f"report_to must be of {', '.join(SINKS)} or none, got {name!r}")
        package = SINKS[name].needs
        try:
            importlib.import_module(package)
        except Exception as error:  # absent, or broken in its own way
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"report_to: {name} needs {package} ({first}): pip install {package}"
            ) from None


class Sinks:
    """All that `report_to` names, for lines as metrics.jsonl has them."""

    def __init__(
        self,
        run: Run,
        say: Callable[[str], None],
    ) -> None:
        self.say = say
        self.open: dict[str, Sink] = {}
        for name in run.config.report_to:
            self._try(name, functools.partial(self._start, name, run))

    def _start(self, name: str, run: Run) -> None:
        self.open[name] = SINKS[name](run)

    def write(self, row: Mapping[str, Any]) -> None:
        step = int(row["step"])
        named = {
            _name(key): float(value)
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float)
        }
        for name, sink in list(self.open.items()):
            self._try(name, functools.partial(sink.write, named, step))

    def close(self) -> None:
        for name, sink in list(self.open.items()):
            self._try(name, sink.close)
        self.open.clear()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a network, a server, a full disk: not worth the run
            self.open.pop(name, None)
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.say(f"warning: {name} takes no more metrics ({first}); metrics.jsonl has them all")


def _name(key: str) -> str:
    """transformers' names in these services: `eval/loss`, `train/loss`."""
    return f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
