"""QLoRA on a CPU: 4-bit weights below an adapter, trained, resumed and saved; what they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import arguments, check, outcome, prepare
from test_train import one_thread  # noqa: F401 (a fixture)

from dpo_kernels.cli import main
from dpo_kernels.train.adapters import _keep_differentiable
from dpo_kernels.train.metrics import read_metrics

bnb = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
peft = pytest.importorskip("peft", reason="pip install peft")
transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")

QLORA: dict[str, Any] = {
    "use_peft": True,
    "load_in_4bit": True,
    "lora_r": 4,
    "lora_target_modules": "all-linear",
    "loss_type": "sigmoid",
    "learning_rate": 1e-2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


def test_a_pass_without_gradients_leaves_them() -> None:
    """bitsandbytes repacks for inference at the first such forward, and has no backward of it."""
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn(64, 64)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", module=layer
    ).to("cpu")
    model = torch.nn.Sequential(layer).eval()
    _keep_differentiable(model)
    x = torch.randn(4, 64)
    with torch.no_grad():
        model(x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True, "use_bnb_nested_quant": True},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "float32", "use_dora": True},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_twenty_steps(
    folder: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter learns on 4-bit weights; on the same weights it loads as peft saved it."""
    options = {**QLORA, "max_steps": 20, **options}
    assert main(arguments(folder, "run", **options)) == 0
    assert "step 0: loss 0.69" in capsys.readouterr().out
    rows = [r for r in read_metrics(folder / "run/metrics.jsonl") if "loss" in r]
    assert rows[-1]["loss"] < 0.5
    saved = folder / "run/model"
    assert not (saved / "model.safetensors").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model",
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
    )
    four = [n for n, m in base.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert four and "lm_head" not in four  # the head is scored in float
    model = peft.PeftModel.from_pretrained(base, saved)
    assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)
    # and on 4 bits it is trained on
    more = {"use_peft": False, "lora_target_modules": None, "use_dora": False}
    more = {**options, **more, "max_steps": 2, "model_name_or_path": saved}
    more = {k: v for k, v in more.items() if v is not None}
    assert main(arguments(folder, "more", **more)) == 0
    assert outcome(folder / "more")["weights"] != outcome(folder / "run")["weights"]


@pytest.mark.parametrize("dry", [False, True])
def test_eight_bits_and_dry_runs(
    folder: Path, dry: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    eight = {"load_in_4bit": False, "load_in_8bit": True} if not dry else {}
    more = arguments(folder, "run", **{**QLORA, "max_steps": 3, **eight})
    assert main([*more, *(["--dry_run"] if dry else [])]) == 0
    assert not dry or "together" in capsys.readouterr().out


def test_a_killed_run_goes_on(folder: Path) -> None:
    assert check(folder, ["in the reference pass", "in a checkpoint"], **QLORA) == []
