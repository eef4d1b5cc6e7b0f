"""A plain training loop with our losses retraces TRL's DPOTrainer step by step.

`trajectories.json.gz` is made by `make_trajectories.py`. Both sides are float32, so the steps agree
to 1e-4 and not to the last bit.
"""

from __future__ import annotations

import base64
import copy
from typing import Any

import numpy as np
import pytest
import torch
from peer_recipes import load

import dpo_kernels as dk

transformers = pytest.importorskip("transformers", reason="the trajectories train a tiny Llama")
DATA = load("trajectories.json.gz")
OPTIMIZERS = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}


def model() -> Any:
    """The tiny Llama with the stored weights."""
    out = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DATA["model"])).float()
    state = {
        k: torch.from_numpy(
            np.frombuffer(base64.b64decode(w["data"]), "<f4").reshape(w["shape"]).copy()
        )
        for k, w in DATA["weights"].items()
    }
    out.load_state_dict(state)
    return out


def loss_of(form: str, policy: Any, ref: Any, batch: dict, ref_logps: Any, options: dict) -> Any:
    ids, mask, scored = (
        torch.tensor(batch[k]) for k in ("input_ids", "attention_mask", "completion_mask")
    )
    labels = ids.masked_fill(scored == 0, -100)
    hidden = policy.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    with torch.no_grad():
        ref_hidden = ref.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    given = {"ref_logps": torch.tensor(ref_logps)} if ref_logps else {}
    if form == "logits":
        given = given or {"ref_logits": ref.lm_head(ref_hidden)}
        return dk.fused_dpo_loss(policy.lm_head(hidden), labels, **given, **options)
    given = given or {"ref_hidden": ref_hidden, "ref_weight": ref.lm_head.weight}
    return dk.fused_linear_dpo_loss(hidden, policy.lm_head.weight, labels, **given, **options)


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("name", DATA["runs"])
def test_retraces_trl(name: str, form: str, backend: str | None) -> None:
    run = DATA["runs"][name]
    settings = run["settings"]
    policy = model()
    ref = copy.deepcopy(policy).requires_grad_(False)
    kind = OPTIMIZERS[settings["optim"]]
    optimizer = kind(policy.parameters(), lr=settings["lr"], weight_decay=0.0)
    for index, (step, batch) in enumerate(zip(run["steps"], DATA["batches"], strict=True)):
        ref_logps = run["ref_logps"][index] if run["ref_logps"] else None
        options = {**settings["loss"], "backend": backend}
        out = loss_of(form, policy, ref, batch, ref_logps, options)
        optimizer.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), DATA["max_grad_norm"])
        optimizer.step()
        got = {
            "loss": out.loss.item(),
            "rewards/chosen": out.chosen_rewards.mean().item(),
            "rewards/rejected": out.rejected_rewards.mean().item(),
            "grad_norm": norm.item(),
        }
        for key, value in got.items():
            near = pytest.approx(step[key], rel=1e-4, abs=1e-4)
            assert value == near, f"step {index}: {key}"
