"""What happens in a process below `dpo-kernels run` when it imports a trainer (`at_start`)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import llamafactory, swift, trl
from .announce import report
from .patching import Patched, options_of

# module of a trainer -> its class, and the maker of its patch
_TRAINERS: dict[str, tuple[str, Callable[[type], Patched | None]]] = {
    "trl.trainer.dpo_trainer": ("DPOTrainer", trl.target_of),
    "trl.trainer.online_dpo_trainer": ("OnlineDPOTrainer", trl.online_target),
    "trl.experimental.online_dpo.online_dpo_trainer": ("OnlineDPOTrainer", trl.online_target),
    "llamafactory.train.dpo.trainer": ("CustomDPOTrainer", llamafactory.target_of),
    "swift.rlhf_trainers.dpo_trainer": ("DPOTrainer", swift.target_of),
}


def patch_module(module: ModuleType, options: dict[str, Any]) -> None:
    """Patch the trainer of a module that has just been loaded."""
    name, target = _TRAINERS[module.__name__]
    kind = vars(module).get(name)
    if kind is None or kind.__module__ != module.__name__:
        return  # a name that is kept for old imports
    options = dict(options)
    on_bypass = options.pop("on_bypass", "raise")
    found = target(kind)
    if found is None:
        return  # which was said
    found.apply(options_of(None, on_bypass, options), on_bypass)
    report(f"patched {module.__name__}.{name}")
