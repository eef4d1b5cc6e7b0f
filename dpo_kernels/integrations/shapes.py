"""The shapes of the DPO trainers known here: which methods they have, with which arguments.

A shape and not a version decides how a trainer is patched: TRL's changed between 0.28 and 0.29, and
whoever builds on TRL changes it too. A shape is read from a class, or, without importing anything,
from the source of one (`dpo-kernels doctor`).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .frameworks import UnsupportedShape, require, version_of

# name of a method -> names of its arguments, or None where it takes any
Methods = Mapping[str, tuple[str, ...] | None]


@dataclass(frozen=True, eq=False)
class Shape:
    """A trainer that is known: the methods that we exchange or call, and arguments they take."""

    name: str
    releases: str
    methods: Methods

    def problems(self, found: Methods) -> list[str]:
        """What `found` lacks of it."""
        said = []
        for name, wanted in self.methods.items():
            if name not in found:
                said.append(f"no {name}")
                continue
            taken = found[name]
            missing = [] if taken is None else [a for a in wanted or () if a not in taken]
            if missing:
                said.append(f"{name}({', '.join(taken or ())}) takes no {', '.join(missing)}")
        return said


JOINED = Shape(
    "joined",
    "trl 0.18 to 0.28",
    {
        "__init__": ("model", "ref_model", "args"),
        "concatenated_inputs": ("batch", "padding_value"),
        "concatenated_forward": ("model", "batch", "is_ref_model"),
        "get_batch_loss_metrics": ("model", "batch", "train_eval"),
        "dpo_loss": ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"),
        "evaluation_loop": ("dataloader", "metric_key_prefix"),
        "_set_signature_columns_if_needed": (),
    },
)
COLLATED = Shape(
    "collated",
    "trl 0.29 and 1.x",
    {
        "__init__": ("model", "ref_model", "args"),
        "_compute_loss": ("model", "inputs", "return_outputs"),
        "compute_ref_log_probs": ("inputs",),
        "_precompute_ref_logps": ("dataset",),
        "_set_signature_columns_if_needed": (),
        "log": ("logs", "start_time"),
    },
)
ONLINE = Shape(
    "online",
    "trl 0.18 to 1.x",
    {
        "__init__": ("model", "ref_model", "args"),
        "_forward": ("model", "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
    },
)
LLAMAFACTORY = Shape(
    "llamafactory",
    "llamafactory 0.9.5",
    {
        "__init__": ("model", "ref_model", "finetuning_args"),
        "concatenated_forward": ("model", "batch", "is_ref_model"),
        "compute_reference_log_probs": ("model", "batch"),
        "compute_preference_loss": (),
        "get_batch_loss_metrics": ("model", "batch", "train_eval"),
    },
)
SWIFT = Shape(
    "swift",
    "ms-swift 4.6",
    {
        "__init__": ("model", "ref_model"),
        "concatenated_forward": ("model", "batch", "is_ref_model"),
        "compute_ref_log_probs": ("batch",),
        "dpo_loss": ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"),
        "get_batch_loss_metrics": ("model", "batch", "train_eval"),
    },
)


@dataclass(frozen=True, eq=False)
class Trainer:
    """A class of another package that is patched: where it is, and the shapes it may have."""

    package: str  # as it is installed
    module: str
    kind: str
    patch: str
    shapes: tuple[Shape, ...]


TRL = Trainer("trl", "trl.trainer.dpo_trainer", "DPOTrainer", "patch_trl()", (JOINED, COLLATED))
TRL_ONLINE = Trainer(
    "trl",
    "trl.experimental.online_dpo.online_dpo_trainer",
    "OnlineDPOTrainer",
    "patch_trl()",
    (ONLINE,),
)
OF_LLAMAFACTORY = Trainer(
    "llamafactory",
    "llamafactory.train.dpo.trainer",
    "CustomDPOTrainer",
    "patch_llamafactory()",
    (LLAMAFACTORY,),
)
OF_SWIFT = Trainer(
    "ms-swift", "swift.rlhf_trainers.dpo_trainer", "DPOTrainer", "patch_swift()", (SWIFT,)
)
OF_AXOLOTL = Trainer(
    "axolotl", "axolotl.core.trainers.dpo.trainer", "AxolotlDPOTrainer", "patch_trl()", ()
)
TRAINERS = (TRL, OF_LLAMAFACTORY, OF_SWIFT, OF_AXOLOTL)


def shape_of(trainer: Trainer, found: Methods, version: str | None) -> Shape:
    """The shape that these methods are; `UnsupportedShape` says what is missing of each."""
    wrong = {shape: shape.problems(found) for shape in trainer.shapes}
    for shape, problems in wrong.items():
        if not problems:
            return shape
    told = "; ".join(f"for that of {s.releases}: {', '.join(p)}" for s, p in wrong.items())
    removed = (
        ". ms-swift removes it when it is imported: with ms-swift use patch_swift() alone"
        if trainer is TRL and "__init__" not in found
        else ""
    )
    raise UnsupportedShape(
        f"{trainer.package} {version or '(unknown version)'}: its {trainer.kind} has no shape that "
        f"is known here ({told}){removed}. Nothing was patched"
    )


def class_of(trainer: Trainer) -> Any:
    """The class itself, imported; `UnsupportedShape` where its package has none of that name."""
    return part_of(trainer, trainer.module, trainer.kind)


def part_of(trainer: Trainer, module: str, name: str) -> Any:
    """What a module of the trainer's package has by this name; else `UnsupportedShape`."""
    require(module.split(".")[0], trainer.package)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, but something that it needs is not: its own message is better
        found = None
    if found is None:
        version = version_of(trainer.package) or "(unknown version)"
        raise UnsupportedShape(
            f"{trainer.package} {version} has no {module}.{name}, which is where "
            f"{trainer.patch} looks for it. Nothing was patched"
        )
    return found


def check_has(owner: Any, names: Iterable[str], trainer: Trainer) -> None:
    """`UnsupportedShape` with those of `names` that this trainer, or its config, lacks."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        _lacks(f"its {type(owner).__name__} has no {', '.join(missing)}", trainer)


def check_batch(batch: Mapping[str, Any], names: Iterable[str], trainer: Trainer) -> None:
    """`UnsupportedShape` with those of `names` that a batch of this trainer lacks."""
    missing = [name for name in names if name not in batch]
    if missing:
        _lacks(f"a batch has no {', '.join(missing)}, but {', '.join(batch)}", trainer)


def _lacks(what: str, trainer: Trainer) -> None:
    version = version_of(trainer.package) or "(unknown version)"
    raise UnsupportedShape(
        f"{trainer.package} {version}: {what}; {trainer.patch} knows none of that shape"
    )


def methods_of(kind: type) -> Methods:
    """The methods of a class; `__init__` counts where it is its own."""
    found: dict[str, tuple[str, ...] | None] = {}
    for name in dir(kind):
        value = inspect.getattr_static(kind, name, None)
        value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if not callable(value) or (name == "__init__" and "__init__" not in vars(kind)):
            continue
        try:
            arguments = inspect.signature(value).parameters.values()
        except (TypeError, ValueError):
            found[name] = None
            continue
        open_ended = any(a.kind is a.VAR_KEYWORD for a in arguments)
        found[name] = None if open_ended else tuple(a.name for a in arguments if a.name != "self")
    return found


def source_of(module: str) -> Path | None:
    """The file of a module of an installed package, without importing any of it."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        file = Path(folder).joinpath(*rest).with_suffix(".py")
        if file.is_file():
            return file
    return None


def methods_in(file: Path, kind: str) -> Methods | None:
    """The methods that a class of this file defines; None where there is no such class."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == kind:
            return {
                f.name: None
                if f.args.kwarg is not None
                else tuple(a.arg for a in (*f.args.args, *f.args.kwonlyargs) if a.arg != "self")
                for f in node.body
                if isinstance(f, ast.FunctionDef)
            }
    return None


def what_a_patch_does(trainer: Trainer) -> str:
    """In words, from the installed source; nothing is imported."""
    version, file = version_of(trainer.package), source_of(trainer.module)
    if version is None:
        return "absent"
    found = None if file is None else methods_in(file, trainer.kind)
    if found is None:
        return f"{version}: not known here: no {trainer.module}.{trainer.kind}"
    if not trainer.shapes:
        own = [n for n in {**JOINED.methods, **COLLATED.methods} if n in found and n != "__init__"]
        over = f"; it overrides {', '.join(own)}" if own else ""
        return f"{version}: {trainer.patch} reaches its {trainer.kind}{over}"
    try:
        shape = shape_of(trainer, found, version)
    except UnsupportedShape as error:
        return str(error)
    return f"{version}: {trainer.patch} exchanges its {trainer.kind} (shape of {shape.releases})"
