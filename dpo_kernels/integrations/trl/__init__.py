"""TRL's DPOTrainer with the fused head and the losses of this package.

    from dpo_kernels.integrations.trl import DPOTrainer   # instead of: from trl import DPOTrainer

or, for code that cannot change its import, before it builds its trainer:

    from dpo_kernels.integrations.trl import patch_trl
    patch_trl()                         # undone by unpatch_trl(), or: with patch_trl(): ...

Same config class, same arguments, same metric names, same results. Beyond TRL: every loss of
`dpo_kernels.losses` by `loss_type`, label smoothing with `sigmoid`, LoRA on lm_head, dataset
columns `beta`, `weight`, `margin`, and what `FusedOptions` holds (`fused=` of the trainer, or
keywords of `patch_trl`). TRL 0.18 to 0.29 and 1.x, told by the methods that its DPOTrainer has; a
trainer of another shape is an error.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from ...models.options import FusedOptions
from ...models.step0 import WrongReference
from .. import frameworks, shapes
from ..patching import BypassedError, Patched, Undo, apply_all, options_of, undo_all

__all__ = ["BypassedError", "FusedOptions", "WrongReference", "patch_trl", "unpatch_trl"]


def _advice(kind: type) -> str:
    """What to do about a trainer that goes past what was exchanged."""
    modules = {base.__module__.split(".")[0] for base in kind.__mro__}
    for package, patch in (("llamafactory", "patch_llamafactory"), ("swift", "patch_swift")):
        if package in modules:
            return f"Call dpo_kernels.integrations.{patch}()."
    return (
        "Let its methods call what they override, or end in dpo_kernels.integrations.plain.dpo_step"
    )


def _targets(allow_untested: bool = False) -> list[Patched]:
    """DPOTrainer and, where TRL has it, OnlineDPOTrainer."""
    frameworks.check_version("trl", allow_untested=allow_untested)
    targets = [target_of(shapes.class_of(shapes.TRL))]
    from . import online

    kind = online.trainer_class()
    second = None if kind is None else online_target(kind)
    return targets if second is None else [*targets, second]


_known: dict[type, Patched] = {}  # class of TRL -> its patch


def target_of(kind: type) -> Patched:
    """The patch of this DPOTrainer, by its shape."""
    if kind not in _known or not _known[kind].active:  # looked at again: others change it too
        found = shapes.methods_of(kind)
        shape = shapes.shape_of(shapes.TRL, found, frameworks.version_of("trl"))
        if shape is shapes.COLLATED:
            from .collated import overrides
        else:
            from .joined import overrides
        _known[kind] = Patched(kind, overrides(kind), patch=shapes.TRL.patch, advice=_advice)
    return _known[kind]


def online_target(kind: type) -> Patched | None:
    """The patch of this OnlineDPOTrainer; None, and a warning, where its shape is not known."""
    from . import online

    if kind not in _known:
        try:
            shapes.shape_of(
                shapes.TRL_ONLINE, shapes.methods_of(kind), frameworks.version_of("trl")
            )
        except frameworks.UnsupportedShape as error:
            warnings.warn(f"{error} of it: it trains without the fused head", stacklevel=3)
            return None
        _known[kind] = Patched(kind, online.overrides(), patch=shapes.TRL.patch, advice=_advice)
    return _known[kind]


def patch_trl(
    fused: FusedOptions | dict[str, Any] | None = None,
    *,
    allow_untested: bool = False,
    on_bypass: str = "raise",
    **options: Any,
) -> Undo:
    """Exchange the methods of TRL's own DPOTrainer and OnlineDPOTrainer, for the whole process.

    Subclasses of them (axolotl's) follow as far as they call what they inherit. One that does not
    is told at its construction, by the names of its methods, and its first step raises
    `BypassedError` (`on_bypass="warn"`: warns). `options` are the fields of `FusedOptions`, or give
    them as `fused`. A second call replaces the options of the first. As a context manager it undoes
    itself. A trainer's first fused step says so in one line (`announce.say`: where it goes, and how
    to silence it).

    Raises:
        UnsupportedVersion: TRL outside 0.18 to 0.29 and 1.x, unless `allow_untested`.
        UnsupportedShape: its DPOTrainer has other methods than those that are known.
        ImportError: no TRL.
    """
    chosen = options_of(fused, on_bypass, options)
    return apply_all(_targets(allow_untested), chosen, on_bypass)


def unpatch_trl() -> None:
    """Undo `patch_trl`, where it is still ours; nothing if TRL is not patched."""
    undo_all(_known.values())


def trainer_class(
    *, allow_untested: bool = False, on_bypass: str = "raise", **options: Any
) -> type:
    """A subclass of TRL's DPOTrainer; `options` are the defaults of its `fused=`."""
    return _targets(allow_untested)[0].subclass(
        options_of(None, on_bypass, options), on_bypass, **_BODY
    )


_BODY = {"__doc__": __doc__, "__module__": __name__}


@functools.cache
def _classes() -> tuple[type, type | None]:
    targets = [target.subclass(FusedOptions(), **_BODY) for target in _targets()]
    return targets[0], targets[1] if len(targets) > 1 else None


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
        return shapes.part_of(shapes.TRL, "trl", "DPOConfig")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
