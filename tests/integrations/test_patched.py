"""Exchanging methods of a class that is not TRL's: whole or not at all, within one another."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest

from dpo_kernels.integrations import announce, at_start
from dpo_kernels.integrations.frameworks import UnsupportedShape
from dpo_kernels.integrations.patching import Patched, apply_all, undo_all
from dpo_kernels.models.options import FusedOptions

PLAIN, OTHER = FusedOptions(), FusedOptions(layout="padded")


def fake(*names: str) -> type:
    return type("Trainer", (), {name: lambda self, said=name: said for name in names})


def patched(kind: type, *names: str) -> Patched:
    def replaced(original):
        return functools.wraps(original)(lambda self: f"fused {original(self)}")

    return Patched(kind, dict.fromkeys(names, replaced), patch="patch_it()", advice=lambda _: "")


def test_a_patch_within_a_patch_leaves_the_outer_one():
    """It took the outer one with it, and what came behind it trained without a word."""
    kind = fake("step")
    target = patched(kind, "step")
    with apply_all([target], PLAIN, "warn"):
        with apply_all([target], OTHER, "raise"):
            assert kind.fused_default is OTHER and target.on_bypass == "raise"
        assert kind.fused_default is PLAIN and target.on_bypass == "warn"
        assert kind().step() == "fused step"
    assert kind().step() == "step" and not hasattr(kind, "fused_default")


def test_a_patch_that_is_undone_by_name_within_stays_undone():
    kind = fake("step")
    target = patched(kind, "step")
    apply_all([target], PLAIN, "raise")
    with apply_all([target], OTHER, "raise"):
        undo_all([target])
    assert kind().step() == "step"


def test_all_or_none():
    """A release without one of the methods: a message, and no half of a patch."""
    kind, other = fake("step", "log"), fake("step")
    targets = [patched(kind, "step", "log"), patched(other, "step", "log", "loop")]
    with pytest.raises(UnsupportedShape, match=r"Trainer has no log, loop, which patch_it\(\)"):
        apply_all(targets, PLAIN, "raise")
    assert kind().step() == "step" and not targets[0].active
    with pytest.raises(UnsupportedShape, match="has no log, loop"):
        targets[1].subclass(PLAIN)


@pytest.mark.parametrize(
    ("patch", "told"),
    [
        (None, "fused={'check_reference': False}"),
        ("patch_trl()", "fused={'check_reference': False} or patch_trl(check_reference=False)"),
        ("patch_swift()", "patch_swift(check_reference=False)"),
    ],
)
def test_how_a_check_is_left_out(patch, told, monkeypatch):
    """Below `dpo-kernels run` there is no program to write it in."""
    trainer = SimpleNamespace(_dpo_home=None if patch is None else SimpleNamespace(patch=patch))
    assert announce.opt_out(trainer, "check_reference") == told
    monkeypatch.setenv(at_start.OPTIONS, "{}")
    if patch is not None:
        wanted = "dpo-kernels run --no_check_reference -- ..."
        assert announce.opt_out(trainer, "check_reference") == wanted
