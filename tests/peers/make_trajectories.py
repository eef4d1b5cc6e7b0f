"""Record `trajectories.json.gz`: short trainings by TRL's DPOTrainer, step by step.

Run it in the environment that `make_cases.py` describes:

    peers/bin/python tests/peers/make_trajectories.py

`DPOTrainer.train()` itself runs on a tiny Llama (float32, CPU, constant learning rate). Stored: the
initial weights, the batches in the order the trainer saw them, the settings of each run, and per
step the loss, mean rewards and gradient norm (before clipping).
"""

from __future__ import annotations

import argparse
import base64
import copy
import logging
import os
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peer_recipes import Stream, save
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl_stand_ins import word_tokenizer

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
PAIRS_PER_BATCH, STEPS, MAX_GRAD_NORM = 4, 16, 1.0
# loss: options of ours and of DPOConfig alike; precomputed: reference sums computed before training
RUNS: dict[str, dict[str, Any]] = {
    "sigmoid": dict(optim="adamw_torch", lr=2e-3, loss=dict(loss_type="sigmoid", beta=0.1)),
    "ipo": dict(optim="sgd", lr=5e-2, loss=dict(loss_type="ipo", beta=0.1)),
    "rpo": dict(
        optim="adamw_torch",
        lr=2e-3,
        loss=dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.2),
    ),
    "wpo_ld": dict(
        optim="adamw_torch",
        lr=2e-3,
        loss=dict(loss_type="sigmoid", beta=0.5, use_weighting=True, ld_alpha=0.4),
    ),
    "precomputed": dict(
        optim="sgd", lr=5e-1, precomputed=True, loss=dict(loss_type="sigmoid", beta=0.3)
    ),
}


def preferences(count: int) -> Dataset:
    """Pairs of random words, of random lengths."""
    s = Stream(77)
    rows = []
    for _ in range(count):
        p, c, r = 2 + s.integers(5, 3) + np.array([0, s.integers(6, 1)[0], 0])
        text = [" ".join(f"w{i}" for i in s.integers(62, int(n))) for n in (p, c, r)]
        rows.append({"prompt": text[0], "chosen": " " + text[1], "rejected": " " + text[2]})
    return Dataset.from_list(rows)


class Recorder(DPOTrainer):
    """DPOTrainer that notes the batch and the unrounded loss of each step."""

    steps: list[dict[str, Any]]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().compute_loss(model, inputs, *args, **kwargs)
        loss = out[0] if isinstance(out, tuple) else out
        self.steps.append(
            {"batch": {k: v.tolist() for k, v in inputs.items()}, "loss": loss.item()}
        )
        return out


class Logs(TrainerCallback):
    """Adds the logged rewards and gradient norm to the step."""

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        self.steps = steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "grad_norm" in logs:
            names = ("rewards/chosen", "rewards/rejected", "grad_norm")
            self.steps[-1] |= {name: float(logs[name]) for name in names}


def train(run: dict[str, Any], model: LlamaForCausalLM, folder: str) -> list[dict[str, Any]]:
    precomputed = run.get("precomputed", False)
    args = DPOConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=PAIRS_PER_BATCH,
        max_steps=STEPS,
        optim=run["optim"],
        learning_rate=run["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        gradient_checkpointing=False,
        pad_to_multiple_of=None,
        precompute_ref_log_probs=precomputed,
        disable_tqdm=True,
        **run["loss"],
    )
    Recorder.steps = []
    trainer = Recorder(
        model=copy.deepcopy(model),
        ref_model=None if precomputed else copy.deepcopy(model),
        args=args,
        train_dataset=preferences(24),
        processing_class=word_tokenizer(),
        callbacks=[Logs(Recorder.steps)],
    )
    trainer.train()
    return Recorder.steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("trajectories.json.gz")
    )
    out = parser.parse_args().out
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).float()
    s = Stream(5)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.dim() > 1:
                # a flat head keeps the WPO weights away from 0
                scale = 0.08 if name == "lm_head.weight" else 0.25
                p.copy_(torch.from_numpy(scale * s.bell(*p.shape)))
            elif "norm" not in name:
                raise AssertionError(f"no recipe for {name}")
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    stored = {
        k: {"shape": list(v.shape), "data": base64.b64encode(v.astype("<f4").tobytes()).decode()}
        for k, v in weights.items()
    }
    runs, batches = {}, None
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            steps = train(run, model, folder)
        seen = [step.pop("batch") for step in steps]
        ref_logps = [
            b.pop("ref_chosen_logps") + b.pop("ref_rejected_logps")
            for b in seen
            if "ref_chosen_logps" in b
        ]
        assert batches in (None, seen), "every run sees the same batches"
        batches = seen
        runs[name] = {"settings": run, "steps": steps, "ref_logps": ref_logps}
        print(name, *(f"{step['loss']:.5f}" for step in steps))
    names = ("trl", "torch", "transformers")
    versions = {name: version(name) for name in names}
    data = {"versions": versions, "model": MODEL, "max_grad_norm": MAX_GRAD_NORM}
    save(out, data | {"weights": stored, "batches": batches, "runs": runs})
    print(out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
