"""LoRA, rsLoRA and DoRA through peft: what is trained, saved, resumed and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import arguments, check, outcome, prepare
from test_train import one_thread  # noqa: F401 (a fixture)

from dpo_kernels.cli import main
from dpo_kernels.train.adapters import check_adapter
from dpo_kernels.train.config import UserError, load_config

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")
LORA = {"use_peft": True, "lora_r": 4, "loss_type": "sigmoid", "learning_rate": 1e-2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("peft", reason="pip install peft")
    prepare(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_target_modules": "all-linear"},
        {"use_dora": True},
        {"lora_modules_to_save": "lm_head"},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_adapter_alone_is_trained_and_saved(
    folder: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """It loads on its base as peft saves it, and scores what the run's evaluation says."""
    import peft

    options = {**LORA, "max_steps": 4, **options}
    assert main(arguments(folder, "run", **options)) == 0
    assert "step 0: loss 0.693147" in capsys.readouterr().out
    saved = folder / "run/model"
    assert not (saved / "model.safetensors").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, saved)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (
        4,
        32,
        bool(options.get("use_rslora")),
        bool(options.get("use_dora")),
    )
    if "lora_modules_to_save" not in options:
        whole = model.merge_and_unload().state_dict()
        assert any(not torch.equal(whole[k], before[k]) for k in before)
        assert torch.equal(whole["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    # the folder of an adapter is a model to go on from
    more = {k: v for k, v in options.items() if "lora" not in k and "peft" not in k}
    more = {**more, "model_name_or_path": saved, "use_dora": False}
    assert main(arguments(folder, "more", **more)) == 0
    first, second = outcome(folder / "run"), outcome(folder / "more")
    assert second["weights"] != first["weights"]


def test_a_named_adapter_is_the_reference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the trained one in its folder: it is scored, not trained, and saved with nothing."""
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    base.name_or_path = str(folder / "model")
    made = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, made)
    model.add_adapter("theirs", made)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B.theirs" in name:
                weight.normal_()
    model.save_pretrained(folder / "two")
    options = {"max_steps": 2, "model_name_or_path": folder / "two", "learning_rate": 1e-3}
    assert main(arguments(folder, "plain", **options)) == 0
    assert main(arguments(folder, "named", **options, ref_adapter_name="theirs")) == 0
    assert f"{Path('two') / 'theirs'}, another checkpoint" in capsys.readouterr().out
    plain, named = (outcome(folder / name) for name in ("plain", "named"))
    assert plain["weights"] != named["weights"]
    assert not (folder / "named/model/theirs").exists()
    assert main(arguments(folder, "none", **options, ref_adapter_name="ours")) == 2
    assert "has no adapter 'ours' below it, expected one of theirs" in capsys.readouterr().err
    with pytest.raises(UserError, match="both name the reference"):
        load_config({"ref_adapter_name": "a", "ref_model_name_or_path": "b"})


def test_a_killed_adapter_goes_on(folder: Path) -> None:
    assert check(folder, ["in a checkpoint"], **LORA) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "add use_peft"),
        ({"use_dora": True}, "use_dora is of an adapter"),
        ({"use_peft": True, "load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ({"use_peft": True, "lora_r": 0}, "lora_r must be at least 1"),
    ],
)
def test_adapters_that_cannot_be(options: dict[str, Any], message: str) -> None:
    if message.startswith("lora_r"):
        pytest.importorskip("peft", reason="pip install peft")
    with pytest.raises(UserError, match=message):
        check_adapter(load_config({**options, "model_name_or_path": "m"}), True)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"use_peft needs peft .*pip install peft"):
        check_adapter(load_config({"use_peft": True}), True)
    monkeypatch.setitem(sys.modules, "peft", sys)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="load_in_4bit needs bitsandbytes"):
        check_adapter(load_config({"use_peft": True, "load_in_4bit": True}), True)
    with pytest.raises(UserError, match="embedded default"):
        check_adapter(load_config({"use_peft": True}), False)


def test_layers_that_peft_does_not_find_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, "run", **LORA, lora_target_modules="nowhere")) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and "lora_target_modules names the layers" in error
    assert not (folder / "run").exists()
