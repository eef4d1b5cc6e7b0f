"""TRL's DPOTrainer with the fused head and the losses of this package.

    from dpo_kernels.integrations.trl import DPOTrainer   # instead of: from trl import DPOTrainer

or, for code that cannot change its import, before it builds its trainer:

    from dpo_kernels.integrations.trl import patch_trl
    patch_trl()                         # undone by unpatch_trl(), or: with patch_trl(): ...

Same config class, same arguments, same metric names, same results. Beyond TRL: every loss of
`dpo_kernels.losses` by `loss_type`, label smoothing with `sigmoid`, LoRA on lm_head, dataset
columns `beta`, `weight`, `margin`, and what `FusedOptions` holds (`fused=` of the trainer, or
keywords of `patch_trl`). TRL 0.18 to 0.24 and 1.0 to 1.16; another version is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..models.options import FusedOptions
from ..models.step0 import WrongReference
from . import frameworks

__all__ = ["FusedOptions", "WrongReference", "patch_trl", "unpatch_trl"]

# name of a method -> maker of its replacement from the original
Overrides = dict[str, Callable[[Any], Any]]
_ABSENT = object()


class _Patched:
    """A class of TRL whose methods can be exchanged and put back."""

    def __init__(self, target: type, overrides: Overrides) -> None:
        self.target = target
        # Found through the bases too: a method that TRL inherits is overridden on its class.
        self.originals = {name: vars(target).get(name, _ABSENT) for name in overrides}
        self.replacements = {name: make(getattr(target, name)) for name, make in overrides.items()}
        self.active = False

    def subclass(self, fused: FusedOptions) -> type:
        body = {**self.replacements, "fused_default": fused, "__doc__": __doc__}
        return type(self.target.__name__, (self.target,), {**body, "__module__": __name__})

    def apply(self, fused: FusedOptions) -> None:
        for name, value in self.replacements.items():
            setattr(self.target, name, value)
        self.target.fused_default = fused  # type: ignore[attr-defined]
        self.active = True

    def undo(self) -> None:
        if not self.active:
            return
        for name, value in self.originals.items():
            if value is _ABSENT:
                delattr(self.target, name)
            else:
                setattr(self.target, name, value)
        del self.target.fused_default  # type: ignore[attr-defined]
        self.active = False


def _targets(allow_untested: bool) -> list[_Patched]:
    """DPOTrainer and, where TRL has it, OnlineDPOTrainer."""
    found = frameworks.check_version("trl", allow_untested=allow_untested)
    return _known_targets(found >= (1,))


@functools.cache
def _known_targets(collated: bool) -> list[_Patched]:
    """Made once, while TRL is as it came: later its methods may be ours."""
    trainer = frameworks.require("trl.trainer.dpo_trainer", "trl").DPOTrainer
    from . import trl_online

    if collated:
        from .trl_v1 import overrides
    else:
        from .trl_v0 import overrides
    targets = [_Patched(trainer, overrides(trainer))]
    online = trl_online.trainer_class()
    if online is not None:
        targets.append(_Patched(online, trl_online.overrides()))
    return targets


class _Undo:
    """What `patch_trl` returns: nothing to do with it, or a context that undoes the patch."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        unpatch_trl()


def patch_trl(
    fused: FusedOptions | dict[str, Any] | None = None,
    *,
    allow_untested: bool = False,
    **options: Any,
) -> _Undo:
    """Exchange the methods of TRL's own DPOTrainer and OnlineDPOTrainer, for the whole process.

    Subclasses of them (LLaMA-Factory's, axolotl's) follow as far as they call what they inherit.
    `options` are the fields of `FusedOptions`, or give them as `fused`. A second call replaces the
    options of the first. As a context manager it undoes itself. A trainer's first fused step says
    so in one line (`announce.announce`: where it goes, and how to silence it).

    Raises:
        UnsupportedVersion: TRL outside the tested ranges, unless `allow_untested`.
        ImportError: no TRL.
    """
    if fused is not None and options:
        raise ValueError(f"give fused or its fields, got both fused and {', '.join(options)}")
    chosen = FusedOptions.of(fused if fused is not None else options, FusedOptions())
    for target in _targets(allow_untested):
        target.apply(chosen)
    return _Undo()


def unpatch_trl() -> None:
    """Undo `patch_trl`; nothing if TRL is not patched. Trainers that exist get TRL's methods."""
    for target in _targets(allow_untested=True):
        target.undo()


def trainer_class(*, allow_untested: bool = False, **options: Any) -> type:
    """A subclass of TRL's DPOTrainer; `options` are the defaults of its `fused=`."""
    return _targets(allow_untested)[0].subclass(FusedOptions(**options))


@functools.cache
def _classes() -> tuple[type, type | None]:
    targets = _targets(False)
    online = targets[1].subclass(FusedOptions()) if len(targets) > 1 else None
    return targets[0].subclass(FusedOptions()), online


def __getattr__(name: str) -> Any:
    if name == "DPOTrainer":
        return _classes()[0]
    if name == "OnlineDPOTrainer":
        trainer = _classes()[1]
        if trainer is None:
            raise ImportError("this TRL has no OnlineDPOTrainer that can be imported here")
        return trainer
    if name == "DPOConfig":
        frameworks.check_version("trl")
        return frameworks.require("trl").DPOConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
