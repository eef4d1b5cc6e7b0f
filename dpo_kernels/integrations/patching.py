"""Exchanging methods of other packages' trainers, putting them back, and noticing a bypass.

A method that we put on a class acts for trainers whose `__init__` was ours; for all others (built
before the patch, or by a subclass that goes past that `__init__`) it is what it was. So a trainer
is either patched whole or not at all, and one that is not is found: every trainer of a patched
class is watched, by way of transformers' own `Trainer.__init__`, which no subclass goes past.
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import transformers

from ..models.attached import head_calls
from ..models.options import FusedOptions
from .announce import say
from .at_start import OPTIONS
from .frameworks import UnsupportedShape

# name of a method -> maker of its replacement from the original
Overrides = dict[str, Callable[[Any], Any]]
ON_BYPASS = ("raise", "warn")
_ABSENT: Any = object()
_OURS = "_dpo_kernels"
# All of ours. No mark on them: `functools.wraps` would copy it to what wraps them.
_methods: weakref.WeakSet[Any] = weakref.WeakSet()


class BypassedError(RuntimeError):
    """A patched trainer whose first step made no fused call."""


class Patched:
    """A class of another package whose methods can be exchanged and put back."""

    def __init__(
        self, target: type, overrides: Overrides, *, patch: str, advice: Callable[[type], str]
    ) -> None:
        self.target, self.overrides = target, overrides
        self.patch, self._advice = patch, advice
        self.on_bypass = "raise"
        self._acts = False
        self._originals: dict[str, Any] = {}  # while it is patched
        self._installed: dict[str, Any] = {}

    @property
    def active(self) -> bool:
        return bool(self._installed)

    @property
    def options(self) -> tuple[FusedOptions, str] | None:
        """What it is patched with; None where it is not."""
        return (self.target.fused_default, self.on_bypass) if self.active else None  # type: ignore[attr-defined]

    @property
    def acts(self) -> bool:
        """Whether trainers built now get our methods, and those built before have them still."""
        return self._acts

    def check(self) -> None:
        """`UnsupportedShape` where the target lacks a method that is exchanged."""
        missing = [name for name in self.overrides if not hasattr(self.target, name)]
        if missing:
            raise UnsupportedShape(
                f"{self.target.__module__}.{self.target.__name__} has no {', '.join(missing)}, "
                f"which {self.patch} exchanges. Nothing was patched"
            )

    def subclass(self, fused: FusedOptions, on_bypass: str = "raise", **body: Any) -> type:
        """A class below the target, which stays as it is, with our methods."""
        self.check()
        home = Patched(self.target, self.overrides, patch=self.patch, advice=self._advice)
        home.on_bypass, home._acts = on_bypass, True
        made = {name: home._made(name, self._original(name)) for name in self.overrides}
        made |= {"fused_default": fused, "_dpo_home": home, **body}
        return type(self.target.__name__, (self.target,), made)

    def apply(self, fused: FusedOptions, on_bypass: str = "raise") -> None:
        """Put our methods in; a second time exchanges the options alone."""
        self.check()
        for name in self.overrides:
            if vars(self.target).get(name, _ABSENT) is self._installed.get(name):
                continue
            self._originals[name] = vars(self.target).get(name, _ABSENT)
            self._installed[name] = self._made(name, getattr(self.target, name))
            setattr(self.target, name, self._installed[name])
        self.target.fused_default = fused  # type: ignore[attr-defined]
        self.on_bypass, self._acts = on_bypass, True
        watch_trainers_of(self)

    def undo(self) -> None:
        """Put back what is still ours: who has changed it since keeps the change."""
        if not self.active:
            return
        for name, value in self._installed.items():
            if vars(self.target).get(name, _ABSENT) is not value:
                continue
            if self._originals[name] is _ABSENT:
                delattr(self.target, name)
            else:
                setattr(self.target, name, self._originals[name])
        if "fused_default" in vars(self.target):
            del self.target.fused_default  # type: ignore[attr-defined]
        self._originals, self._installed = {}, {}
        self._acts = False  # who has wrapped our `__init__` keeps it
        watch_no_longer(self)

    def overridden(self, trainer: Any) -> list[str]:
        """Methods of ours that a trainer does not get: whose it has, and the name."""
        found, kind = [], type(trainer)
        for name in self.overrides:
            if name in vars(trainer):
                found.append(f"{kind.__name__}.{name} (set on the trainer itself)")
                continue
            base = next((b for b in kind.__mro__ if name in vars(b)), None)
            if base is None:
                found.append(f"{kind.__name__}.{name} (removed)")
            elif vars(base)[name] not in _methods:
                found.append(f"{base.__name__}.{name}")
        return found

    def advice(self, kind: type) -> str:
        return self._advice(kind)

    def _original(self, name: str) -> Any:
        if not self.active:
            return getattr(self.target, name)
        original = self._originals[name]
        if original is not _ABSENT:
            return original
        return next(vars(b)[name] for b in self.target.__mro__[1:] if name in vars(b))

    def _made(self, name: str, original: Any) -> Any:
        replacement = self.overrides[name](original)
        guarded = "__init__" in self.overrides

        if name == "__init__":

            @functools.wraps(replacement)
            def method(trainer: Any, *args: Any, **kwargs: Any) -> None:
                # A patch of its subclass has been here, or this one is undone.
                if "_dpo_home" in vars(trainer) or not self._acts:
                    original(trainer, *args, **kwargs)
                    return
                trainer._dpo_home = self
                replacement(trainer, *args, **kwargs)
                observe(trainer)

        else:

            @functools.wraps(replacement)
            def method(trainer: Any, *args: Any, **kwargs: Any) -> Any:
                mine = not guarded or vars(trainer).get("_dpo_home") is self
                return (replacement if mine else original)(trainer, *args, **kwargs)

        _methods.add(method)
        return method


# --- every trainer of a patched class is watched ---

_active: list[Patched] = []
_hooks: dict[str, Any] = {}  # name of a method of transformers' Trainer -> ours in its place


def watch_trainers_of(patched: Patched) -> None:
    """Let transformers' Trainer be observed when it is built, as long as something is patched."""
    if patched not in _active:
        _active.append(patched)
    for name in ("__init__", "train"):
        plain = getattr(transformers.Trainer, name)
        if getattr(plain, _OURS, None) is None:
            _hooks[name] = _hook(name, plain)
            setattr(transformers.Trainer, name, _hooks[name])


def _hook(name: str, plain: Any) -> Any:
    @functools.wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "train":
            keep_watching(self)
        result = plain(self, *args, **kwargs)
        if name == "__init__":
            observe(self)
        return result

    setattr(method, _OURS, plain)
    return method


def watch_no_longer(patched: Patched) -> None:
    if patched in _active:
        _active.remove(patched)
    while not _active and _hooks:
        name, hook = _hooks.popitem()
        if getattr(transformers.Trainer, name) is hook:
            setattr(transformers.Trainer, name, getattr(hook, _OURS))


def _home_of(trainer: Any) -> Patched | None:
    """The patch that this trainer should be under: the nearest among its classes."""
    own = getattr(trainer, "_dpo_home", None)
    if own is not None:
        return own
    for base in type(trainer).__mro__:
        for patched in _active:
            if patched.target is base:
                return patched
    return None


def observe(trainer: Any) -> None:
    """Watch a trainer of a patched class, and name the methods of ours that it does not get."""
    home = _home_of(trainer)
    if home is None or "_dpo_watch" in vars(trainer):
        return
    trainer._dpo_watch = watch = _callback()(trainer, home)
    watch.name_overridden(trainer)
    trainer.callback_handler.add_callback(watch)


def keep_watching(trainer: Any) -> None:
    """Put the watch back, where a trainer has thrown its callbacks away since."""
    watch = vars(trainer).get("_dpo_watch")
    if watch is not None and watch not in trainer.callback_handler.callbacks:
        trainer.callback_handler.add_callback(watch)


class _Watch:
    """A callback: at the end of a trainer's first step, has the fused head run?"""

    def __init__(self, trainer: Any, home: Patched) -> None:
        self._trainer = weakref.ref(trainer)  # the trainer has its callbacks: no circle
        self._home = home
        self._named: list[str] = []
        self._before: int | None = None

    def name_overridden(self, trainer: Any) -> None:
        """Say which methods of ours this trainer does not get, unless that was said."""
        home, names = self._home, self._home.overridden(trainer)
        if not home.acts or not names or names == self._named:
            return
        self._named = names
        say(
            trainer,
            logging.WARNING if home.on_bypass == "warn" else logging.INFO,
            f"{type(trainer).__name__} has methods of its own where {home.patch} exchanged "
            f"{home.target.__name__}'s: {', '.join(names)}. They have to call what they override; "
            "the end of the first step shows whether the fused head ran",
        )

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        self._before = None if trainer is None else head_calls(trainer.model)
        if trainer is not None:
            self.name_overridden(trainer)  # what was set since

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        trainer, before = self._trainer(), self._before
        self._before = None
        if trainer is None or before is None or head_calls(trainer.model) > before:
            return
        kind, home = type(trainer), self._home
        names = home.overridden(trainer)
        if not home.acts:
            why = "the patch was undone after it was built. Build and train it under the patch."
        elif names:
            why = (
                f"it has methods of its own where {home.patch} exchanged {home.target.__name__}'s "
                f"({', '.join(names)}). {home.advice(kind)}"
            )
        else:
            why = f"what it calls is not what was exchanged. {home.advice(kind)}"
        text = (
            f"{kind.__name__} is below a {home.target.__name__} that {home.patch} has patched, but "
            f"its first step made no fused call: {why}"
        )
        if home.on_bypass == "raise":
            below_run = OPTIONS in os.environ
            warn = "dpo-kernels run --on_bypass warn -- ..." if below_run else "on_bypass='warn'"
            raise BypassedError(f"{text} To train without the fused head: {warn}")
        say(trainer, logging.WARNING, text)

    on_substep_end = on_step_end


@functools.cache
def _callback() -> type:
    """Made when it is needed: importing transformers' callbacks imports PEFT."""
    return type("DPOKernelsWatch", (_Watch, transformers.TrainerCallback), {})


def options_of(
    fused: FusedOptions | dict[str, Any] | None, on_bypass: str, options: dict[str, Any]
) -> FusedOptions:
    """What a `patch_...()` was given, checked."""
    if on_bypass not in ON_BYPASS:
        raise ValueError(f"on_bypass must be one of {', '.join(ON_BYPASS)}, got {on_bypass!r}")
    if fused is not None and options:
        raise ValueError(f"give fused or its fields, got both fused and {', '.join(options)}")
    return FusedOptions.of(fused if fused is not None else options, FusedOptions())


class Undo:
    """What a `patch_...()` returns: nothing to do with it, or a context that undoes the patch.

    A patch within a patch leaves the outer one as it was, its options too.
    """

    def __init__(self, before: list[tuple[Patched, tuple[FusedOptions, str] | None]]) -> None:
        self._before = before

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for target, options in self._before:
            if options is None:
                target.undo()
            elif target.active:  # not undone by name since
                target.apply(*options)


def apply_all(targets: Iterable[Patched], fused: FusedOptions, on_bypass: str) -> Undo:
    """Put the methods of all in, or of none."""
    targets = list(targets)
    for target in targets:
        target.check()
    before = [(target, target.options) for target in targets]
    for target in targets:
        target.apply(fused, on_bypass)
    return Undo(before)


def undo_all(targets: Iterable[Patched]) -> None:
    for target in targets:
        target.undo()
