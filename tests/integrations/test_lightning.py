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
    PreferenceCollator,
    WrongReference,
)


def fit(module, steps=3, validate=False):
    loader = DataLoader(examples(12), 4, collate_fn=PreferenceCollator(0))
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
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
