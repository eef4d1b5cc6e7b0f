"""The LightningModule: a short run, its checks, its checkpoint."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch

pytest.importorskip("lightning", reason="pip install lightning")

from lightning.pytorch import Trainer
from test_transformers import examples, plain_logps
from torch.utils.data import DataLoader

from dpo_kernels.integrations.lightning import (
    DPOModule,
    FirstStepError,
    PreferenceCollator,
    WrongReference,
)
from dpo_kernels.models.reference_cache import ReferenceCache

SIDES = ("chosen", "rejected")


def fit(module, steps=3, validate=False, data=None, collate=None, **options):
    rows = examples(12) if data is None else data
    loader = DataLoader(rows, 4, collate_fn=collate or PreferenceCollator(0))
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader, *([loader] if validate else []))
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


def test_fit_is_plain_torch():
    model = tiny.model(dtype=torch.float64)
    reference, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    module = DPOModule(
        model, ref_model=reference, beta=0.3, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    metrics = fit(module, validate=True)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for batch in DataLoader(examples(12), 4, collate_fn=PreferenceCollator(0)):
        with torch.no_grad():
            ref = plain_logps(reference, batch)
        chosen, rejected = (plain_logps(by_hand, batch) - ref).chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in by_hand.state_dict().items():
        assert (model.state_dict()[name] - value).abs().max() < 1e-9, name
    assert {"loss", "rewards/margins", "eval_loss", "eval_rewards/accuracies"} <= metrics.keys()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert not any("ref" in key for key in module.state_dict())


def test_step0():
    with pytest.raises(WrongReference):
        fit(DPOModule(tiny.model(), ref_model=tiny.model(seed=1)))
    fit(DPOModule(tiny.model(), ref_model=tiny.model(seed=1), fused={"check_reference": False}))
    with pytest.raises(ValueError, match="no reference"):
        fit(DPOModule(tiny.model()))


def test_peft_is_its_own_reference():
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.model(), config)
    metrics = fit(DPOModule(model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)), steps=6)
    assert metrics["loss"] < math.log(2)


def test_beta_dpo_keeps_its_state():
    module = DPOModule(tiny.model(), ref_model=tiny.model(), loss_type="beta_dpo")
    fit(module, steps=2)
    assert "beta_dpo_state" in module.state_dict()


# --- what is found at or before step 1 ---


def of(policy=None, reference="copy", rate=1e-2, **options):
    policy = tiny.model() if policy is None else policy
    reference = copy.deepcopy(policy) if reference == "copy" else reference
    return DPOModule(
        policy,
        ref_model=reference,
        optimizer=lambda p: torch.optim.SGD([*p], lr=rate),
        **options,
    )


def test_the_first_step():
    with pytest.raises(FirstStepError, match="the learning rate is 0"):
        fit(of(rate=0.0))
    fit(of(rate=0.0, fused={"check_first_step": False}))
    fit(of(), accumulate_grad_batches=2)
    rows = examples(12)
    for row in rows:
        row["chosen_ids"], row["rejected_ids"] = ([*row[f"{s}_ids"], 1, 1] for s in SIDES)
    with pytest.raises(FirstStepError, match=r"end token \(EOS, id 1\) twice"):
        fit(of(), data=rows)

    def masked(rows):
        batch = PreferenceCollator(0)(rows)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    with pytest.raises(FirstStepError, match="labels are all masked"):
        fit(of(), collate=masked)
    model = tiny.model()
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].detach(),))
    with pytest.raises(FirstStepError, match="the head alone has a gradient"):
        fit(of(model))
    with pytest.raises(FirstStepError, match="too small for bfloat16"):
        fit(of(tiny.model(dtype=torch.bfloat16), rate=1e-9))


def test_merged_adapter():
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(tiny.model(), config)
    policy.merge_adapter()
    with pytest.raises((FirstStepError, ValueError), match="merged"):
        fit(of(policy, tiny.model()))


def test_the_cache_of_the_reference(tmp_path, monkeypatch):
    fused = {"reference_cache": str(tmp_path)}
    assert fit(of(fused=fused))["loss"] == pytest.approx(fit(of())["loss"], abs=1e-6)
    put = ReferenceCache.put
    monkeypatch.setattr(ReferenceCache, "put", lambda *_: pytest.fail("scored again"))
    for options in ({"rate": 1e-3}, {"loss_type": "ipo"}, {"ld_alpha": 0.5}):
        kept = fit(of(fused=fused, **options), data=examples(12)[::-1])["loss"]
        plain = fit(of(**options), data=examples(12)[::-1])["loss"]
        assert kept == pytest.approx(plain, abs=1e-5)
    monkeypatch.setattr(ReferenceCache, "put", put)
    stale = ReferenceCache.get
    monkeypatch.setattr(
        ReferenceCache, "get", lambda *a: [v - 1 for v in stale(*a)] if stale(*a) else None
    )
    with pytest.raises(WrongReference, match=r"stale reference log-probs \(a cache\)"):
        fit(of(fused=fused))


def test_a_named_adapter_is_the_reference():
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(tiny.model(), config)
    policy.add_adapter("theirs", config)
    fit(of(policy, None, fused={"ref_adapter_name": "theirs"}))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B.theirs" in name:
                weight.fill_(0.5)
    with pytest.raises(WrongReference):
        fit(of(policy, None, fused={"ref_adapter_name": "theirs"}))


def test_falling_log_probs():
    module = of(rate=0.0, fused={"check_first_step": False, "check_reference": False})
    module._ref_model[0].get_output_embeddings().weight.data.mul_(0.2)
    with torch.no_grad():
        for weight in module.model.parameters():
            weight.mul_(1.5)
    with pytest.warns(UserWarning, match=r"fall together.*pair \d of step"):
        fit(module, log_every_n_steps=2)


def test_the_columns_of_rows():
    smoothed = fit(of(), data=examples(12, label_smoothing=lambda i: 0.3))["loss"]
    assert smoothed == pytest.approx(fit(of(label_smoothing=0.3))["loss"], abs=1e-5)
    with pytest.warns(UserWarning, match="'group' is not used here"):
        fit(of(), data=examples(12, group=lambda i: "a"))
