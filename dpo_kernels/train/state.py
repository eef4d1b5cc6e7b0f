"""The state of a run between two steps: what a checkpoint keeps, and how it is put back.

    trained weights, buffers; optimizer and schedule; the loss's own (beta-DPO's running margin,
    learned offsets); EMA; generators of random numbers; counters and sums of metrics

Tensors go by names ("model/lm_head.weight", "optimizer/lm_head.weight/exp_avg"), so that neither
the order of parameters nor pickled objects matter. What the weights were before training is not
here: the reference's log-probs are kept once for the whole run (`save_reference`).
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .checkpoints import reason
from .config import UserError
from .metrics import PairMeter, UnpairedMeter, meter_of
from .optim import Stepper
from .reference import Reference


@dataclass
class Progress:
    """Counters of a run; plain values alone."""

    step: int = 0
    tokens: int = 0  # of all steps
    logged_steps: int = 0  # steps since the last line of metrics
    logged_tokens: int = 0
    computed: int = 0  # positions that the trunk computed since then
    padded: int = 0  # positions that padded batches would have had
    skipped_steps: int = 0
    step0: tuple[float, float] = (0.0, 0.0)  # loss of the first batch, and at zero log-ratios
    best: float | None = None  # of early stopping
    worse: int = 0  # evaluations since the best
    times: list[float] = field(default_factory=list)  # seconds of each step
    meter: PairMeter | UnpairedMeter = field(default_factory=PairMeter)

    def values(self) -> dict[str, Any]:
        return {**vars(self), "times": self.times[-256:], "meter": self.meter.state()}

    def restore(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, meter_of(value) if name == "meter" else value)


@dataclass
class TrainingState:
    """The parts of a run that its steps change."""

    model: nn.Module
    stepper: Stepper
    modules: dict[str, Any]  # what has a state_dict beside the model: the loss, groups, average
    progress: Progress

    def tensors(self) -> dict[str, Tensor]:
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        found: dict[str, Tensor] = {f"model/{n}": p for n, p in trained}
        found |= {f"buffer/{n}": b for n, b in _persistent_buffers(self.model).items()}
        for key, module in self.modules.items():
            found |= {f"{key}/{n}": x for n, x in module.state_dict().items()}
        for name, entry in self.stepper.state().items():
            found |= {f"optimizer/{name}/{k}": v for k, v in entry.items() if _is_tensor(v)}
        found["rng/torch"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for i, state in enumerate(torch.cuda.get_rng_state_all()):
                found[f"rng/cuda/{i}"] = state
        return found

    def shards_like(self, name: str, size: tuple[int, ...]) -> Tensor | None:
        """The tensor in shards that one of a checkpoint is to be read as; None where it is whole.

        A moment is in shards as its weight is.
        """
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            rest = rest.rpartition("/")[0]
        found: Tensor | None = None
        if kind in ("model", "optimizer"):
            found = self._named.get(rest)
        elif kind == "average" and kind in self.modules:
            found = self.modules[kind].state_dict().get(rest)
        if found is None or not hasattr(found, "full_tensor") or tuple(found.shape) != size:
            return None
        return found

    @functools.cached_property
    def _named(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def values(self) -> dict[str, Any]:
        entries = self.stepper.state()
        plain = {
            name: {k: v for k, v in entry.items() if not _is_tensor(v)}
            for name, entry in entries.items()
        }
        generator: Any = numpy.random.get_state()
        return {
            "progress": self.progress.values(),
            "optimizer": {"groups": self.stepper.group_options(), "state": plain},
            "schedule": self.stepper.schedule_state(),
            "rng": {
                "python": random.getstate(),
                "numpy": [generator[0], generator[1].tolist(), *generator[2:]],
            },
        }

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], what: str) -> None:
        """Put all of it back; `UserError` if it is of a model with other tensors."""
        mine = {k for k in self.tensors() if not k.startswith(("optimizer/", "rng/"))}
        theirs = {k for k in tensors if not k.startswith(("optimizer/", "rng/"))}
        if mine != theirs:
            odd = sorted(mine ^ theirs)
            raise UserError(
                f"{what} has other tensors: {', '.join(odd[:4])}"
                + (f" and {len(odd) - 4} more" if odd[4:] else "")
            )
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    p.copy_(tensors[f"model/{name}"])
            for name, b in _persistent_buffers(self.model).items():
                b.copy_(tensors[f"buffer/{name}"])
        for key, module in self.modules.items():
            start = len(key) + 1
            module.load_state_dict(
                {k[start:]: v for k, v in tensors.items() if k.startswith(key + "/")}
            )
        entries: dict[str, dict[str, Any]] = {
            name: dict(plain) for name, plain in values["optimizer"]["state"].items()
        }
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                name, _, part = key.removeprefix("optimizer/").rpartition("/")
                entries.setdefault(name, {})[part] = value
        self.stepper.restore(entries, values["optimizer"]["groups"], values["schedule"])
        self.progress.restore(values["progress"])
        _restore_generators(tensors, values["rng"])


def _restore_generators(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["rng/torch"])
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for i in devices:
        if f"rng/cuda/{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng/cuda/{i}"], i)
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, key, *rest = values["numpy"]
    numpy.random.set_state((kind, numpy.array(key, dtype=numpy.uint32), *rest))


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict().keys()
    return {name: b for name, b in model.named_buffers() if name in saved}


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


# --- the reference of a run ---

_REFERENCE = "reference.safetensors"


def save_reference(folder: Path, references: Mapping[str, Reference | None]) -> None:
    """Keep what the starting policy gave to each set of pairs; a file that is whole or not there.

    Sets by name ("training", "held out"). A sequence's values: one sum, or its scored tokens.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, reference in references.items():
        if reference is None or not reference.chosen:
            continue
        every = list(reference.chosen)
        tensors[f"{name}/indices"] = torch.tensor(every)
        for k, found in enumerate(reference.sides):
            side, values = _side(k), list(found.values())
            tensors[f"{name}/{side}"] = torch.cat([v.reshape(-1) for v in values])
            if list(found) != every:  # of lists, some are longer
                tensors[f"{name}/{side} indices"] = torch.tensor(list(found))
            if values[0].dim():
                lengths = torch.tensor([len(v) for v in values])
                tensors[f"{name}/{side} lengths"] = lengths
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (_REFERENCE + ".tmp")
    save_file(tensors, part)
    os.replace(part, folder / _REFERENCE)


def _side(k: int) -> str:
    """What a file calls the values of the rows' sequence `k`."""
    return ("chosen", "rejected")[k] if k < 2 else f"sequence {k}"


def load_reference(folder: Path) -> dict[str, Reference]:
    """The sets that were kept; `UserError` if the file is not there or torn."""
    from safetensors.torch import load_file

    file = folder / _REFERENCE
    try:
        tensors = load_file(file)
    except Exception as error:  # the file's, or safetensors' own
        raise UserError(
            f"resume_from_checkpoint: {file} cannot be read: {reason(error)}. It holds the "
            "reference's log-probs, which the trained weights cannot give again"
        ) from None
    found = {}
    for key in tensors:
        name, _, part = key.rpartition("/")
        if part != "indices":
            continue
        sides: list[dict[int, Tensor]] = []
        while f"{name}/{(side := _side(len(sides)))}" in tensors:
            indices = tensors.get(f"{name}/{side} indices", tensors[key]).tolist()
            lengths = tensors.get(f"{name}/{side} lengths")
            values = tensors[f"{name}/{side}"]
            rows = values.unbind() if lengths is None else values.split(lengths.tolist())
            # clones: a view would keep the whole file in memory and in what is saved
            sides.append({i: v.clone() for i, v in zip(indices, rows, strict=True)})
        found[name] = Reference(*sides)
    return found
