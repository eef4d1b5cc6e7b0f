"""The patch of TRL: what it exchanges and puts back, what it says, and that no bypass is silent."""

from __future__ import annotations

import contextlib
import functools
import logging

import pytest
import torch

pytest.importorskip("trl", reason="pip install trl")
pytest.importorskip("peft", reason="pip install peft")

import transformers
import trl
from trl_runs import V1, assert_same, make, run

from dpo_kernels.integrations import announce, frameworks
from dpo_kernels.integrations import trl as integration
from dpo_kernels.integrations.trl import (
    BypassedError,
    DPOTrainer,
    collated,
    online,
    patch_trl,
    unpatch_trl,
)

TRLS_OWN = trl.DPOTrainer
INIT = TRLS_OWN.__init__
TRAINERS_OWN = (transformers.Trainer.__init__, transformers.Trainer.train)
METHODS = {name: getattr(TRLS_OWN, name) for name in integration.target_of(TRLS_OWN).overrides}
FORWARD = "_compute_loss" if V1 else "concatenated_forward"


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_trl()
    assert TRLS_OWN.__init__ is INIT
    assert (transformers.Trainer.__init__, transformers.Trainer.train) == TRAINERS_OWN


def test_patch_and_unpatch():
    assert patch_trl() is not None
    assert TRLS_OWN.__init__ is not INIT
    patched = run(TRLS_OWN, loss_type="dpop", max_steps=2)
    unpatch_trl()
    assert TRLS_OWN.__init__ is INIT
    assert not hasattr(TRLS_OWN, "fused_default")
    ours = run(DPOTrainer, loss_type="dpop", max_steps=2)
    assert_same(patched, ours, 1e-6, 1e-6)


def test_patch_as_a_context_with_options():
    with patch_trl(share_prefix=True, check_reference=False):
        made = make(TRLS_OWN)
        assert made.fused.share_prefix and not made.fused.check_reference
    assert TRLS_OWN.__init__ is INIT
    with pytest.raises(TypeError):
        make(TRLS_OWN, fused={})


def test_subclasses_follow_the_patch():
    class Custom(TRLS_OWN):
        def compute_loss(self, *args, **kwargs):
            self.seen = True
            return super().compute_loss(*args, **kwargs)

    patch_trl()
    made = run(Custom, loss_type="cal_dpo", max_steps=1)
    assert made.trainer.seen


def test_patching_twice_and_undoing_an_unpatched_trl():
    patch_trl(share_prefix=True)
    patch_trl(head_stats=False)
    assert TRLS_OWN.fused_default == integration.FusedOptions(head_stats=False)
    unpatch_trl()
    unpatch_trl()


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="dpop_lamda"):
        patch_trl(loss_options={"dpop_lamda": 3.0})
    with pytest.raises(TypeError):
        patch_trl(shared_prefix=True)
    with pytest.raises(ValueError, match="both"):
        patch_trl({"share_prefix": True}, head_stats=False)


def test_a_version_outside_the_range_is_refused(monkeypatch):
    monkeypatch.setitem(frameworks.TESTED, "trl", (("0.1", "0.2"),))
    with pytest.raises(frameworks.UnsupportedVersion, match=r"trl>=0.1,<0.2"):
        patch_trl()
    patch_trl(allow_untested=True)
    unpatch_trl()


@pytest.mark.parametrize("patched", [True, False])
def test_the_first_step_says_that_the_fused_head_runs(patched, caplog):
    """A patch that does nothing looks like one that works."""
    with patch_trl() if patched else contextlib.nullcontext():
        run(trl.DPOTrainer if patched else DPOTrainer, max_steps=2)
    (line,) = [r for r in caplog.records if r.name == "dpo_kernels.trl"]
    assert line.levelname == "INFO"
    parts = (
        "DPOTrainer",
        f"trl {trl.__version__}",
        transformers.__version__,
        "strategy",
        "backend",
    )
    assert all(part in line.message for part in parts), line.message


def test_that_line_is_seen_unless_silenced(monkeypatch, capsys):
    """Neither Python's logging nor transformers' shows INFO by default."""
    made = make(DPOTrainer)
    monkeypatch.setattr(announce.logger, "hasHandlers", lambda: False)
    announce.announce(made, torch.float32, "streaming")
    assert capsys.readouterr().err.count("runs the fused head: strategy streaming") == 1
    monkeypatch.setattr(logging.getLogger("dpo_kernels"), "level", logging.WARNING)
    announce.announce(made, torch.float32, "streaming")
    assert not capsys.readouterr().err


# --- no bypass is silent ---


def said(caplog):
    return [r.message for r in caplog.records if r.name == "dpo_kernels.trl"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_a_subclass_overrides_is_named(name, caplog):
    """At its construction; and as it calls what it overrides, the fused head runs."""

    def method(self, *args, **kwargs):
        return getattr(super(Custom, self), name)(*args, **kwargs)

    Custom = type("Custom", (TRLS_OWN,), {name: method})
    with patch_trl():
        made = make(Custom, max_steps=1)
        (line,) = said(caplog)
        assert f"Custom.{name}" in line and "patch_trl()" in line
        made.train()
    assert any("runs the fused head" in line for line in said(caplog))


def _own(self, *args, **kwargs):
    return METHODS[FORWARD](self, *args, **kwargs)


def _below(trainer):
    class Below(type("Custom", (trainer,), {FORWARD: _own})):
        pass

    return Below


MANNERS = {
    "two levels up": _below,
    "in a mixin": lambda trainer: type("Mine", (type("Custom", (), {FORWARD: _own}), trainer), {}),
    # `wraps` copies what a method carries: ours carries nothing that makes its wrapper ours
    "wrapped": lambda trainer: type(
        "Custom", (trainer,), {FORWARD: functools.wraps(getattr(trainer, FORWARD))(_own)}
    ),
}


@pytest.mark.parametrize("manner", MANNERS)
def test_a_method_is_named_however_it_is_overridden(manner, caplog):
    with patch_trl():
        made = make(MANNERS[manner](TRLS_OWN), max_steps=1)
        (line,) = said(caplog)
        assert f"Custom.{FORWARD}" in line
        with pytest.raises(BypassedError, match=f"Custom.{FORWARD}"):
            made.train()


def test_a_method_set_on_the_trainer_itself_is_named(caplog):
    """After its construction: at the start of the training."""
    with patch_trl():
        made = make(TRLS_OWN, max_steps=1)
        assert not said(caplog)
        setattr(made, FORWARD, METHODS[FORWARD].__get__(made))
        with pytest.raises(BypassedError, match=f"DPOTrainer.{FORWARD} .set on the trainer"):
            made.train()
    assert f"DPOTrainer.{FORWARD} (set on the trainer itself)" in said(caplog)[0]


def test_what_is_put_over_ours_afterwards_is_named(monkeypatch, caplog):
    """By another package, on TRL's class."""
    with patch_trl():
        monkeypatch.setattr(TRLS_OWN, FORWARD, _own)
        with pytest.raises(BypassedError, match=f"DPOTrainer.{FORWARD}"):
            run(TRLS_OWN, max_steps=1)
        monkeypatch.undo()


@pytest.mark.parametrize("on_bypass", ["raise", "warn"])
@pytest.mark.parametrize("name", ["__init__", FORWARD, "training_step"])
def test_the_first_step_of_a_subclass_that_goes_past_the_patch(name, on_bypass, caplog):
    """Whatever it overrides: TRL's own forward, its construction, or the step itself."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = sum(p.float().square().sum() for p in model.parameters())
        self.accelerator.backward(loss)
        return loss.detach()

    Custom = type("Custom", (TRLS_OWN,), {name: METHODS.get(name, training_step)})
    with patch_trl(on_bypass=on_bypass):
        made = make(Custom, max_steps=2)
        if on_bypass == "warn":
            made.train()
            (line,) = [x for x in said(caplog) if "made no fused call" in x]
        else:
            with pytest.raises(BypassedError, match="on_bypass='warn'") as raised:
                made.train()
            assert made.state.global_step == 1
            line = str(raised.value)
    assert (f"Custom.{name}" in line) is (name in METHODS)


def test_a_trainer_that_throws_its_callbacks_away_is_watched_still():
    class Custom(TRLS_OWN):
        def compute_loss(self, model, *args, **kwargs):
            return sum(p.float().square().sum() for p in model.parameters())

    with patch_trl():
        made = make(Custom, max_steps=1)
        made.callback_handler.callbacks.clear()
        with pytest.raises(BypassedError, match="Custom is below a DPOTrainer"):
            made.train()


def test_a_subclass_of_ours_is_watched_too():
    class Custom(DPOTrainer):
        pass

    setattr(Custom, FORWARD, METHODS[FORWARD])
    with pytest.raises(BypassedError, match=f"Custom.{FORWARD}"):
        run(Custom, max_steps=1)


def test_a_trainer_from_before_the_patch_stays_trls():
    made = make(TRLS_OWN, max_steps=1)
    with patch_trl():
        made.train()
    assert made.state.global_step == 1


def test_a_trainer_that_is_trained_behind_its_patch_is_told(caplog):
    """Built within the context, trained after it: TRL's methods are back."""
    with patch_trl():
        made = make(TRLS_OWN, max_steps=1)
    with pytest.raises(BypassedError, match="the patch was undone after it was built"):
        made.train()
    assert not said(caplog)


def test_a_patch_within_a_patch_leaves_the_outer_one():
    patch_trl(head_stats=False)
    with patch_trl(layout="padded"):
        assert make(TRLS_OWN).fused.layout == "padded"
    made = run(TRLS_OWN, max_steps=1).trainer
    assert not made.fused.head_stats and made.fused.layout == "auto"


def test_how_a_bypass_is_met_is_one_of_two():
    with pytest.raises(ValueError, match="on_bypass must be one of raise, warn, got 'ignore'"):
        patch_trl(on_bypass="ignore")


# --- others change TRL too ---


def test_what_someone_else_has_put_in_since_stays(monkeypatch):
    patch_trl()
    theirs = lambda self, *args, **kwargs: None  # noqa: E731
    monkeypatch.setattr(TRLS_OWN, FORWARD, theirs, raising=True)
    unpatch_trl()
    assert vars(TRLS_OWN)[FORWARD] is theirs and TRLS_OWN.__init__ is INIT
    monkeypatch.undo()
    setattr(TRLS_OWN, FORWARD, METHODS[FORWARD])  # the undoing put ours back


def test_a_method_that_someone_has_removed_stays_removed():
    """ms-swift deletes DPOTrainer.__init__ when it is imported."""
    patch_trl()
    del TRLS_OWN.__init__
    try:
        unpatch_trl()
        assert "__init__" not in vars(TRLS_OWN)
        with pytest.raises(frameworks.UnsupportedShape, match=r"no __init__.*patch_swift\(\)"):
            patch_trl()
    finally:
        TRLS_OWN.__init__ = INIT


def test_an_init_that_someone_has_wrapped_is_trls_after_the_unpatch():
    patch_trl()
    ours = TRLS_OWN.__init__
    TRLS_OWN.__init__ = lambda self, *args, **kwargs: ours(self, *args, **kwargs)
    try:
        unpatch_trl()
        assert not hasattr(make(TRLS_OWN), "fused")
    finally:
        TRLS_OWN.__init__ = INIT


@pytest.mark.skipif(not V1, reason="0.18 to 0.28 will not change any more")
@pytest.mark.parametrize("names", ["_OF_THE_CONFIG", "_OF_THE_TRAINER"])
def test_a_release_without_what_is_read_is_a_message(names, monkeypatch):
    """The same methods, but another config or other attributes."""
    monkeypatch.setattr(collated, names, (*getattr(collated, names), "renamed_in_1_99"))
    with patch_trl(), pytest.raises(frameworks.UnsupportedShape, match="has no renamed_in_1_99"):
        make(TRLS_OWN)


def test_a_shape_that_is_not_known_is_a_message(monkeypatch):
    """An invented release: whatever its version says, nothing is patched."""
    monkeypatch.setattr(frameworks, "version", lambda package: "1.99.0")

    def step(self, model, batch):
        raise NotImplementedError

    monkeypatch.setattr(TRLS_OWN, FORWARD, step)
    for options in ({}, {"allow_untested": True}):
        with pytest.raises(frameworks.UnsupportedShape, match=r"trl 1\.99\.0: its DPOTrainer") as e:
            patch_trl(**options)
        assert f"{FORWARD}(model, batch) takes no" in str(e.value)
    assert TRLS_OWN.__init__ is INIT


@pytest.mark.parametrize("name", [n for n in METHODS if n != "_compute_loss_liger"])
def test_a_release_without_one_of_the_methods_is_a_message(name, monkeypatch):
    """Whichever; and nothing of the others is exchanged."""
    for base in TRLS_OWN.__mro__[: 1 if name == "__init__" else None]:
        if name in vars(base):
            monkeypatch.delattr(base, name)
    with pytest.raises(frameworks.UnsupportedShape, match=f"no .*{name}.*Nothing was patched"):
        patch_trl()
    assert not any(getattr(TRLS_OWN, n, None) is not m for n, m in METHODS.items() if n != name)


def test_an_online_trainer_of_another_shape_is_left_alone(monkeypatch):
    """It is experimental there; DPOTrainer is patched all the same."""
    kind = type("OnlineDPOTrainer", (), {"__init__": lambda self, model, ref_model, args: None})
    monkeypatch.setattr(online, "trainer_class", lambda: kind)
    with pytest.warns(UserWarning, match=r"no _forward.*it trains without the fused head"):
        patch_trl()
    assert TRLS_OWN.__init__ is not INIT and not hasattr(kind, "fused_default")


@pytest.mark.skipif(not V1, reason="0.18 to 0.28 will not change any more")
def test_a_batch_of_another_shape_is_a_message():
    with patch_trl():
        made = make(TRLS_OWN, max_steps=1)
        collate = made.data_collator

        def renamed(examples):
            batch = collate(examples)
            return {k.replace("completion_mask", "mask_1_99"): v for k, v in batch.items()}

        made.data_collator = renamed
        with pytest.raises(frameworks.UnsupportedShape, match="a batch has no completion_mask"):
            made.train()


@pytest.mark.skipif(not V1, reason="0.18 to 0.28 will not change any more")
def test_a_release_without_what_is_called_is_a_message(monkeypatch):
    monkeypatch.delattr("trl.models.utils.disable_gradient_checkpointing")
    monkeypatch.delitem(integration._known, TRLS_OWN)
    with pytest.raises(frameworks.UnsupportedShape, match=r"no trl\.models\.utils\.disable_"):
        patch_trl()
    assert TRLS_OWN.__init__ is INIT
