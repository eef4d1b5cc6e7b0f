"""The checks around step 1 and the reference cache, under TRL and transformers' Trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch

pytest.importorskip("trl", reason="pip install trl")

import trl_runs
from test_transformers import trainer as hf_trainer

from dpo_kernels.integrations.trl import DPOTrainer, WrongReference, collated
from dpo_kernels.models.reference_cache import ReferenceCache
from dpo_kernels.models.step1 import FirstStepError

needs_v1 = pytest.mark.skipif(not trl_runs.V1, reason="of TRL 1.x")


def run(model: Any = None, **options: Any) -> Any:
    """Train `max_steps=2` under TRL; options of the config, and of the trainer with `of_`."""
    mine = {k[3:]: options.pop(k) for k in list(options) if k.startswith("of_")}
    rows = mine.pop("rows", None)
    args = trl_runs.config(**{"max_steps": 2, **options})
    model = tiny.model() if model is None else model
    from datasets import Dataset

    made = DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows or tiny.rows(12)),
        **{
            "ref_model": copy.deepcopy(model),
            "processing_class": tiny.tokenizer(),
            **mine,
        },
    )
    made.train()
    return made


def test_wrong_reference() -> None:
    with pytest.raises(WrongReference, match="another reference model"):
        run(of_ref_model=tiny.model(seed=5))


def test_learning_rate_of_zero() -> None:
    with pytest.raises(FirstStepError, match="the learning rate is 0"):
        run(learning_rate=0.0)
    run(learning_rate=0.0, of_fused={"check_first_step": False})
    run(warmup_steps=1)


@needs_v1
def test_masked_labels() -> None:
    made = DPOTrainer(
        model=tiny.model(),
        ref_model=tiny.model(),
        args=trl_runs.config(max_steps=2),
        train_dataset=__import__("datasets").Dataset.from_list(tiny.rows(12)),
        processing_class=tiny.tokenizer(),
    )
    collate = made.data_collator

    def masked(examples: Any) -> Any:
        batch = collate(examples)
        batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
        return batch

    made.data_collator = masked
    with pytest.raises(FirstStepError, match="labels are all masked"):
        made.train()


@needs_v1
def test_rows_that_trl_leaves_out() -> None:
    """It drops rows without a scored token; that none is left was torch's `num_samples=0`."""
    rows = [{**r, "prompt": " ".join(["w1"] * 20)} for r in tiny.rows(12)]
    with pytest.raises((FirstStepError, ValueError), match=r"no token of train_dataset|all masked"):
        run(of_rows=rows, max_length=10, truncation_mode="keep_start")


# TRL 0.x writes an end token behind every completion, behind a template's line break too.
@pytest.mark.parametrize(
    "end",
    [
        "<eos> <eos> ",
        pytest.param("<eos> w9 <eos> w9 ", marks=needs_v1),
        pytest.param("<eos> <eos> w9 ", marks=needs_v1),
    ],
)
def test_end_tokens_that_the_chat_template_doubles(end: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m.content }} "
        + end
        + "{% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
    )
    sides = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [
        {k: [{"role": role, "content": r[k].strip()}] for k, role in sides.items()}
        for r in tiny.rows(12)
    ]
    with pytest.raises(FirstStepError, match=r"end token \(EOS, id 1\) twice"):
        run(of_rows=rows, of_processing_class=tokenizer)


def test_a_schedule_that_never_begins() -> None:
    for options in ({"max_steps": 1, "warmup_steps": 5}, {}):
        model = tiny.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        never = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        mine = {} if options else {"of_optimizers": (optimizer, never)}
        with pytest.raises(FirstStepError, match="the learning rate is 0 by its schedule"):
            run(model, **options, **mine)


def test_doubled_end_token() -> None:
    rows = [{k: v + " <eos> <eos>" * (k != "prompt") for k, v in r.items()} for r in tiny.rows(12)]
    with pytest.raises(FirstStepError, match=r"end token \(EOS, id 1\) twice"):
        run(of_rows=rows)


def test_merged_adapter() -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    policy = peft.get_peft_model(tiny.model(), trl_runs.lora())
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    merged = policy.merge_and_unload()
    with pytest.raises((WrongReference, FirstStepError), match="merged"):
        run(merged, of_ref_model=tiny.model())
    still = peft.get_peft_model(tiny.model(), trl_runs.lora())
    still.merge_adapter()
    with pytest.raises((WrongReference, FirstStepError, ValueError), match="merged"):
        run(still, of_ref_model=tiny.model())


@needs_v1
def test_the_cache_of_the_reference(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """trl 1.16 keys its cache without ld_alpha; ours holds tokens. A second run asks nothing."""
    asked: list[int] = []
    plain = collated._reference

    def watched(*args: Any) -> Any:
        asked.append(1)
        return plain(*args)

    monkeypatch.setattr(collated, "_reference", watched)
    fused = {"reference_cache": str(tmp_path)}
    first = run(of_fused=fused, max_steps=3)
    assert len(asked) == 4  # three batches, and once to name it
    monkeypatch.setattr(ReferenceCache, "put", lambda *args: pytest.fail("scored again"))
    for options in ({"learning_rate": 1e-4}, {"ld_alpha": 0.5}, {"loss_type": "ipo"}):
        asked.clear()
        again = run(of_fused=fused, max_steps=3, **options)
        assert len(asked) == 1
        without = run(max_steps=3, **options)
        got, expected = (
            [h["loss"] for h in t.state.log_history if "loss" in h] for t in (again, without)
        )
        assert got == pytest.approx(expected, abs=1e-6)
    assert first.state.global_step == 3


@needs_v1
def test_stale_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of other weights under this name: no key can tell, step 0 does."""
    fused = {"reference_cache": str(tmp_path)}
    run(of_fused=fused)
    plain = ReferenceCache.get

    def stale(self: Any, keys: Any) -> Any:
        found = plain(self, keys)
        return None if found is None else [v - 1 for v in found]

    monkeypatch.setattr(ReferenceCache, "get", stale)
    with pytest.raises(WrongReference, match=r"stale reference log-probs \(a cache\)"):
        run(of_fused=fused)


def test_the_cache_of_any_release(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that keep prompt and completion apart ask the reference in their own forward."""
    fused = {"reference_cache": str(tmp_path)}

    def losses(**options: Any) -> list[float]:
        history = run(max_steps=3, learning_rate=0.02, **options).state.log_history
        return [h["loss"] for h in history if "loss" in h]

    assert losses(of_fused=fused) == pytest.approx(losses(), abs=1e-5)
    monkeypatch.setattr(ReferenceCache, "put", lambda *args: pytest.fail("scored again"))
    for options in ({"beta": 0.5}, {"loss_type": "hinge"}):
        assert losses(of_fused=fused, **options) == pytest.approx(losses(**options), abs=1e-5)


@needs_v1
@pytest.mark.skipif(trl_runs.VERSION < (1, 9), reason="TRL loads the reference by its name there")
def test_precomputed_log_probs_beside_the_cache(tmp_path: Any) -> None:
    """Without a ref_model there is none to ask later: the policy's own would be taken for it."""
    options = {"max_steps": 3, "precompute_ref_log_probs": True, "learning_rate": 0.05}
    wanted, found = (
        [
            h["loss"]
            for h in run(of_ref_model=None, of_fused=fused, **options).state.log_history
            if "loss" in h
        ]
        for fused in ({}, {"reference_cache": str(tmp_path)})
    )
    assert found == pytest.approx(wanted, abs=1e-5) and abs(found[-1] - 0.6931) > 1e-3
    for alpha in (None, 0.5):
        kept = [
            run(of_fused=f, ld_alpha=alpha, **options).state.log_history[-2]["loss"]
            for f in ({}, {"reference_cache": str(tmp_path)})
        ]
        assert kept[0] == pytest.approx(kept[1], abs=1e-5)


@needs_v1
def test_a_reference_that_moves_has_no_cache(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=r"reference_cache: not used \(the reference follows"):
        run(of_fused={"reference_cache": str(tmp_path)}, sync_ref_model=True)
    assert not list(tmp_path.iterdir())


def test_a_named_adapter_is_the_reference() -> None:
    """Before TRL's own copy of the trained one, which it calls `ref`."""
    peft = pytest.importorskip("peft", reason="pip install peft")

    def trained(theirs: float, name: str = "theirs") -> None:
        policy = peft.get_peft_model(tiny.model(), trl_runs.lora())
        policy.add_adapter("theirs", trl_runs.lora())
        with torch.no_grad():
            for weight_name, weight in policy.named_parameters():
                if "lora_B.theirs" in weight_name:
                    weight.fill_(theirs)
        run(policy, of_ref_model=None, of_fused={"ref_adapter_name": name})

    trained(0.0)
    with pytest.raises(WrongReference):
        trained(0.5)
    with pytest.raises(ValueError, match="no adapter 'ours', expected one of"):
        trained(0.0, "ours")


def test_label_smoothing_of_rows_and_groups() -> None:
    def losses(made: Any) -> list[float]:
        return [h["loss"] for h in made.state.log_history if "loss" in h]

    rows = tiny.rows(12, label_smoothing=lambda i: 0.3)
    wanted = losses(run(of_fused={"loss_options": {"label_smoothing": 0.3}}, learning_rate=0.05))
    assert losses(run(of_rows=rows, learning_rate=0.05)) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ValueError, match=r"'label_smoothing' of train_dataset row 3.*got 1\.5"):
        run(of_rows=tiny.rows(12, label_smoothing=lambda i: 0.1 if i < 3 else 1.5))
    with pytest.warns(UserWarning, match="'group' is not used here.*--learn_groups"):
        run(of_rows=tiny.rows(12, group=lambda i: "a"))


def test_no_reference_has_no_fall() -> None:
    """Rewards of a loss without a reference are no log-ratios."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fall together.*")
        run(loss_type="simpo", max_steps=3)


def test_under_transformers_trainer(tmp_path: Any) -> None:
    with pytest.raises(FirstStepError, match="the learning rate is 0"):
        hf_trainer(
            tmp_path, tiny.model(), ref_model=tiny.model(), max_steps=2, learning_rate=0.0
        ).train()
