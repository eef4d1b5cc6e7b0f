"""The checks around the first step, the reference's cache and the columns of rows, in a loop of the
user's own and under transformers' Trainer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

pytest.importorskip("accelerate", reason="pip install accelerate")

from test_transformers import batches, examples
from test_transformers import trainer as made_trainer

from dpo_kernels.integrations import plain, watched
from dpo_kernels.integrations.plain import PreferenceCollator
from dpo_kernels.models.attached import attach_head
from dpo_kernels.models.falling import FallingLogps
from dpo_kernels.models.nonfinite import NonFiniteLoss
from dpo_kernels.models.reference_cache import (
    ReferenceCache,
    reference_identity,
    sequence_key,
    sequences_of,
)
from dpo_kernels.models.step0 import WrongReference
from dpo_kernels.models.step1 import FirstStepError


def loop(
    model: Any = None,
    data: Any = None,
    rate: float = 1e-2,
    optimizers: Any = None,
    fused: Any = None,
    reference: Any = None,
    **options: Any,
) -> list[float]:
    """Steps of plain torch over `data`; the losses."""
    model = tiny.model() if model is None else model
    attach_head(model)
    reference = copy.deepcopy(model) if reference is None else reference
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad] or every
    steps = optimizers(model) if optimizers else [torch.optim.SGD(trained, lr=rate)]
    losses = []
    for i, batch in enumerate(data or batches(3)):
        ref = plain.reference_logps(reference, batch, fused=fused)
        out = plain.dpo_step(model, batch, ref_logps=ref, fused=fused, **options)
        if i == 0:
            plain.check_reference(model, out, batch, ref_logps=ref)
        assert out.loss is not None
        out.loss.backward()
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(out.loss))
    return losses


def under_trainer(model: Any = None, data: Any = None, rate: float = 1e-2, **options: Any) -> Any:
    made = made_trainer(
        options.pop("folder"),
        model,
        options.pop("reference", "copy"),
        data,
        learning_rate=rate,
        **{"max_steps": 3, **options},
    )
    made.train()
    return [row["loss"] for row in made.state.log_history if "loss" in row]


@pytest.fixture(autouse=True)
def no_hooks_left() -> Any:
    """A run that ended in an error leaves its model to wait for a step that never comes."""
    yield
    watched._waiting.clear()
    watched._tidy()


@pytest.fixture(params=["loop", "Trainer"])
def train(request: Any, tmp_path: Path) -> Any:
    """A run of three steps; `data` are examples."""

    def run(**options: Any) -> Any:
        data = options.pop("data", None) or examples(12)
        if request.param == "Trainer":
            return under_trainer(data=data, folder=tmp_path / "run", **options)
        collate = PreferenceCollator(0)
        loss = options.pop("loss_options", {})
        groups = [collate(data[i : i + 4]) for i in range(0, len(data), 4)]
        return loop(data=groups, **options, **loss)

    return run


# --- the six mistakes ---


def test_wrong_reference(train: Any) -> None:
    with pytest.raises(WrongReference, match="another reference"):
        train(reference=tiny.model(seed=5))


def test_stale_cache(train: Any, tmp_path: Path) -> None:
    """Values of other weights under this name: no key can tell, step 0 does."""
    model = tiny.model()
    with ReferenceCache(tmp_path / "cache", reference_identity(model, torch.float32)) as cache:
        for example in examples(12):
            batch = PreferenceCollator(0)([example])
            sequences = sequences_of(batch["input_ids"], batch["attention_mask"], batch["labels"])
            values = [torch.full((s.num_scored,), -1.0) for s in sequences]
            cache.put([sequence_key(s) for s in sequences], values)
    with pytest.raises(WrongReference, match=r"stale reference log-probs \(a cache\)"):
        train(model=model, fused={"reference_cache": str(tmp_path / "cache")})


def test_masked_labels(tmp_path: Path) -> None:
    data = batches(2)
    for batch in data:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(FirstStepError, match="labels are all masked"):
        loop(data=data)

    def masked(rows: Any) -> Any:
        batch = PreferenceCollator(0)(rows)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    made = made_trainer(tmp_path)
    made.data_collator = masked
    with pytest.raises(FirstStepError, match="labels are all masked"):
        made.train()


def test_doubled_end_token(train: Any) -> None:
    data = examples(12)
    for row in data:
        for side in ("chosen_ids", "rejected_ids"):
            row[side] = [*row[side], 1, 1]
    with pytest.raises(FirstStepError, match=r"end token \(EOS, id 1\) twice"):
        train(data=data)
    assert len(train(data=data, fused={"check_first_step": False})) == 3


def test_merged_adapter(train: Any) -> None:
    """Merged, nothing of it is trained; and frozen weights are the same without PEFT."""
    with pytest.raises((FirstStepError, ValueError), match="merged"):
        train(model=tiny.model().requires_grad_(False).train(), reference=tiny.model())
    peft = pytest.importorskip("peft", reason="pip install peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(tiny.model(), options)
    policy.merge_adapter()
    with pytest.raises((FirstStepError, ValueError), match="merged"):
        train(model=policy.train(), reference=tiny.model())


def test_learning_rate_of_zero(train: Any) -> None:
    with pytest.raises(FirstStepError, match="the learning rate is 0"):
        train(rate=0.0)
    assert len(train(rate=0.0, fused={"check_first_step": False})) == 3


# --- of a loop of one's own ---


def test_a_detached_head_and_small_updates() -> None:
    model = tiny.model()
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    with pytest.raises(FirstStepError, match="the head alone has a gradient"):
        loop(model)
    with pytest.raises(FirstStepError, match="too small for bfloat16"):
        loop(tiny.model(dtype=torch.bfloat16), rate=1e-9)


def test_the_hooks_go_when_the_step_is_seen() -> None:
    """Of all optimizers there are hooks, so none may stay; an evaluation puts none there."""
    model, (batch, *_) = tiny.model(), batches(2)
    attach_head(model)
    with torch.no_grad():
        plain.dpo_step(model, batch, reference_free=True)
    assert not watched._hooks
    loop(tiny.model())
    plain.dpo_step(model, batch, reference_free=True)
    assert watched._hooks and len(watched._waiting) == 1
    del model
    watched._tidy()
    assert not watched._hooks and not watched._waiting


def test_optimizers_of_parts_and_closures() -> None:
    def halves(model: Any) -> list[Any]:
        every = list(model.parameters())
        return [torch.optim.SGD(every[::2], lr=1e-2), torch.optim.AdamW(every[1::2], lr=1e-2)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(optimizers=halves)
    model, (batch, *_) = tiny.model(), batches(1)
    attach_head(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=2)

    def closure() -> Any:
        optimizer.zero_grad()
        out = plain.dpo_step(model, batch, reference_free=True)
        out.loss.backward()
        return out.loss

    closure()
    optimizer.step(closure)


def test_what_a_loop_is_told_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "EVERY", 2)
    model, (batch, *_) = tiny.model(), batches(1)
    attach_head(model)
    ref = plain.reference_logps(model, batch) + 2.0  # of what the policy has lost since

    def steps(reference: Any, **options: Any) -> None:
        for _ in range(2):
            plain.dpo_step(model, batch, ref_logps=reference, fused=options)

    with pytest.warns(UserWarning, match="fall together"):
        steps(ref)
    with pytest.raises(FallingLogps, match="pair 0 of step"):
        steps(ref, on_falling_logps="stop")
    nan = torch.full_like(ref, float("nan"))
    with pytest.warns(UserWarning, match=r"the loss of step 1 is nan: .*Its rows begin"):
        steps(nan, head_stats=False)
    with pytest.raises(NonFiniteLoss, match="loss_type sigmoid"):
        steps(nan, on_nonfinite_loss="stop")
    with pytest.raises(ValueError, match="on_nonfinite_loss must be 'warn', 'stop' or 'ignore'"):
        steps(ref, on_nonfinite_loss="maybe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.dpo_step(model, batch, reference_free=True)
        plain.dpo_step(model, batch, reference_free=True)


def test_a_trainer_is_told_of_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """Its own log shows the mean of those that are (logging_nan_inf_filter)."""

    def broken(rows: Any) -> Any:
        batch = PreferenceCollator(0)(rows)
        return {**batch, "ref_logps": torch.full((8,), float("nan"))}

    for choice, caught in (
        ("warn", pytest.warns(UserWarning, match=r"the loss of step 1 is nan.*Its rows begin: ")),
        ("stop", pytest.raises(NonFiniteLoss)),
    ):
        fused = {
            "check_reference": False,
            "check_first_step": False,
            "on_nonfinite_loss": choice,
        }
        made = made_trainer(tmp_path, ref_model=None, fused=fused, max_steps=2)
        made.data_collator = broken
        with caught:
            made.train()


# --- the cache ---


def test_the_cache_serves_other_runs(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another learning rate, loss, ld_alpha and order: nothing is scored, and nothing differs."""
    fused = {"reference_cache": str(tmp_path / "cache")}
    first = train(fused=fused)
    assert first == pytest.approx(train(), abs=1e-6)
    monkeypatch.setattr(ReferenceCache, "put", lambda *_: pytest.fail("scored again"))
    backwards = examples(12)[::-1]
    for options in (
        {"rate": 1e-3},
        {"loss_options": {"loss_type": "ipo", "beta": 0.3}},
        {"loss_options": {"ld_alpha": 0.5}},
        {"data": backwards},
    ):
        assert train(fused=fused, **options) == pytest.approx(train(**options), abs=1e-5)


def test_a_reference_that_is_changed_is_seen(tmp_path: Path) -> None:
    """A loop may do with its reference what it likes: the values follow, whatever is kept."""
    model, (batch, *_) = tiny.model(), batches(1)
    attach_head(model)
    fused = {"reference_cache": str(tmp_path)}
    for way in ("in place", "data", "nothing", "data", "data", "data"):
        with torch.no_grad():
            weight = model.model.layers[0].mlp.up_proj.weight
            if way == "in place":
                weight.mul_(1.1)
            if way == "data":
                weight.data.mul_(1.1)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            kept = plain.reference_logps(model, batch, fused=fused)
        assert torch.allclose(kept, plain.reference_logps(model, batch), atol=1e-6)
    with torch.no_grad():
        weight.mul_(1.1)
    kept = plain.reference_logps(model, batch, fused=fused)
    assert torch.allclose(kept, plain.reference_logps(model, batch), atol=1e-6)


def test_what_is_not_kept_is_said(tmp_path: Path) -> None:
    model, (batch, *_) = tiny.model(), batches(1)
    attach_head(model)
    fused = {"reference_cache": str(tmp_path)}
    with pytest.warns(UserWarning, match=r"reference_cache: not used .*position_ids"):
        ids = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        plain.reference_logps(
            model, {**batch, "position_ids": ids}, fused={**fused, "layout": "padded"}
        )
    with pytest.warns(UserWarning, match="reference_cache: not used .*whole distributions"):
        plain.reference_states(model, batch, fused=fused)


def test_half_precisions_have_caches_of_their_own(tmp_path: Path) -> None:
    model, (batch, *_) = tiny.model(), batches(1)
    attach_head(model)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            plain.reference_logps(model, batch, fused={"reference_cache": str(tmp_path)})
            model = copy.deepcopy(model)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate does
    plain.reference_logps(model, batch, fused={"reference_cache": str(tmp_path)})
    assert len(list(tmp_path.iterdir())) == 2
    plain.reference_logps(tiny.model(), batch, fused={"reference_cache": str(tmp_path)})
    assert len(list(tmp_path.iterdir())) == 3


# --- a named adapter ---


def two_adapters() -> Any:
    """A PEFT model whose adapters `mine`, which is trained, and `theirs` give different values."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.model(), options, adapter_name="mine")
    model.add_adapter("theirs", options)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B.theirs" in name:
                weight.normal_()
            if "lora_A.mine" in name:
                weight.copy_(model.get_parameter(name.replace("mine", "theirs")))
    return model


def test_a_named_adapter_is_the_reference(tmp_path: Path) -> None:
    """Equal to the trained one it passes step 0 and stays as it is; another one is found there."""
    fused = {"ref_adapter_name": "theirs"}
    model = two_adapters()
    with pytest.raises(WrongReference):
        made_trainer(tmp_path, model, None, fused=fused).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B.mine" in name:
                weight.copy_(model.get_parameter(name.replace("mine", "theirs")))
    kept = {n: p.clone() for n, p in model.named_parameters() if "theirs" in n}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    losses = under_trainer(model, folder=tmp_path, reference=None, fused=fused)
    assert losses[0] == pytest.approx(0.6931, abs=2e-4) and losses[-1] != losses[0]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(model.get_parameter(n), p) for n, p in kept.items())
    with pytest.raises(ValueError, match="ref_model is another model: give one of them"):
        made_trainer(tmp_path, tiny.model(), fused=fused).train()


def test_adapters_that_cannot_be_the_reference() -> None:
    model, (batch, *_) = two_adapters(), batches(1)
    with pytest.raises(ValueError, match="no adapter 'other', expected one of 'mine', 'theirs'"):
        plain.reference_logps(model, batch, fused={"ref_adapter_name": "other"})
    with pytest.raises(ValueError, match="'mine' is the adapter that is trained"):
        plain.reference_logps(model, batch, fused={"ref_adapter_name": "mine"})
    theirs = plain.reference_logps(model, batch, fused={"ref_adapter_name": "theirs"})
    model.set_adapter("theirs")
    assert torch.equal(theirs, plain.reference_logps(model, batch))


# --- columns of rows ---


def test_label_smoothing_and_the_rest_reach_the_loss(train: Any) -> None:
    values = [0.0, 0.1, 0.3, 0.2]
    smoothed = train(data=examples(12, label_smoothing=lambda i: values[i % 4]))
    assert smoothed[1:] != pytest.approx(train()[1:], abs=1e-4)
    even = train(data=examples(12, label_smoothing=lambda i: 0.2))
    same = train(loss_options={"label_smoothing": 0.2})
    assert even == pytest.approx(same, abs=2e-4)
    with pytest.raises(ValueError, match=r"label_smoothing.*no meaning for"):
        train(
            data=examples(12, label_smoothing=lambda i: 0.2),
            loss_options={"loss_type": "hinge"},
        )


@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [
        ("label_smoothing", 1.5, r"a number in \[0, 1\), got 1.5"),
        ("beta", 0.0, "a number above 0, got 0.0"),
        ("weight", -1, "a number of at least 0, got -1"),
        ("margin", "2", "a finite number, got '2'"),
    ],
)
def test_numbers_out_of_range(column: str, value: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"column '{column}' of example 1.*{wanted}"):
        PreferenceCollator(0)(examples(2, **{column: lambda i: value if i else 0.5}))


def test_a_column_that_some_rows_have_is_not_dropped() -> None:
    rows = examples(2)
    rows[1]["weight"] = 0.5
    with pytest.raises(ValueError, match=r"column .weight. of example 0.*got None"):
        PreferenceCollator(0)(rows)


def test_groups_are_named() -> None:
    with pytest.warns(UserWarning, match="'group' is not used here.*--learn_groups"):
        PreferenceCollator(0)(examples(2, group=lambda i: "a"))
