"""`dpo-kernels train`: models it refuses, adapters, experts, and what bf16 means."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

from dpo_kernels.cli import main
from dpo_kernels.train.optim import MOVED

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")


@pytest.fixture
def train(tmp_path, capsys):
    """Train a folder for two steps: (exit code, what was printed, the run's folder)."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in tiny.rows(8)))

    def run(model, *options):
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        code = main(
            [
                "train",
                "--model_name_or_path",
                str(model),
                "--dataset_name",
                str(data),
                "--output_dir",
                str(out),
                "--max_steps",
                "2",
                "--device",
                "cpu",
                "--sample_max_new_tokens",
                "2",
                "--logging_steps",
                "1",
                *options,
            ]
        )
        shown = capsys.readouterr()
        return code, shown.out + shown.err, out

    return run


def without(folder, *names):
    """The folder's checkpoint without some of its weights."""
    from safetensors.torch import load_file, save_file

    file = Path(folder) / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if k not in names}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_missing_weights_are_named(tmp_path, train):
    """SelectiveDPO#7"""
    names = "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
    folder = without(tiny.save(tmp_path / "m", tiny.model()), *names)
    code, text, _ = train(folder)
    assert code == 2 and all(name in text for name in names) and "at random" in text
    tied = tiny.save(tmp_path / "tied", tiny.model(tie_word_embeddings=True))
    assert train(tied)[0] == 0  # lm_head.weight is not in the file, and is not missing


def test_unused_weights_are_said(tmp_path, train):
    from safetensors.torch import load_file, save_file

    folder = tiny.save(tmp_path / "m", tiny.model())
    file = Path(folder) / "model.safetensors"
    save_file({**load_file(file), "v_head.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    code, text, _ = train(folder)
    assert code == 0 and "does not use: v_head.weight" in text


@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_encoder_decoders(tmp_path, train, kind):
    """trl#579"""
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    code, text, _ = train(tiny.save(tmp_path / "m", model))
    assert code == 2 and "is an encoder-decoder" in text


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def with_images(kind):
    """A tiny model of text and images."""
    text = tiny.model().config.to_dict() | {"head_dim": 8}
    if kind == "Gemma3":
        config = transformers.Gemma3Config(
            text_config=text | {"model_type": "gemma3_text"},
            vision_config=VISION,
            mm_tokens_per_image=4,
        )
    else:
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text),
            vision_config=transformers.CLIPVisionConfig(**VISION),
        )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def test_models_of_images_are_refused_by_name(tmp_path, train):
    code, text, _ = train(tiny.save(tmp_path / "m", with_images("Llava")))
    assert code == 2 and "is a model of images or sounds (llava, vision_config)" in text
    assert "DPOTrainer takes it" in text


@pytest.mark.parametrize("column", ["images", "pixel_values"])
def test_rows_with_images_are_refused_by_name(tmp_path, train, column):
    """Also below a model that could be trained on text, with its images left out."""
    model = tiny.save(tmp_path / "m", tiny.model())
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(json.dumps({**row, column: ["a.png"]}) for row in tiny.rows(8)))
    code, text, _ = train(model)
    assert code == 2 and f"{column}: a list, expected text alone" in text
    assert "8 not supported" in text and "pictures, films and sounds" in text


def test_quantised_folders(tmp_path, train):
    """LlamaFactory#3225: found out before training, not when it is saved."""
    folder = Path(tiny.save(tmp_path / "m", tiny.model()))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    code, text, _ = train(folder)
    assert code == 2 and "bitsandbytes 4-bit weights, which can neither be trained" in text


def test_an_adapter_names_its_base(tmp_path, train, monkeypatch):
    """torchtune#2272"""
    folder = tmp_path / "adapter"
    folder.mkdir()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"}))
    monkeypatch.setitem(sys.modules, "peft", None)
    code, text, _ = train(folder)
    assert code == 2 and "LORA adapter of the base model some/base" in text
    assert "pip install peft" in text
    file.write_text(json.dumps({"peft_type": "LORA"}))
    assert "does not name its base model" in train(folder)[1]


def test_an_adapter_is_trained_and_saved(tmp_path, train):
    """torchtune#2272"""
    peft = pytest.importorskip("peft", reason="pip install peft")
    base = tiny.save(tmp_path / "base", tiny.model())
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], lora_dropout=0.3, task_type="CAUSAL_LM"
    )
    adapter = peft.get_peft_model(tiny.model(), config)
    adapter.peft_config["default"].base_model_name_or_path = base
    adapter.save_pretrained(tmp_path / "adapter")
    code, text, out = train(tmp_path / "adapter", "--learning_rate", "1e-2")
    assert code == 0 and "step 0: loss 0.693147" in text
    saved = peft.PeftModel.from_pretrained(tiny.model(), out / "model")
    changed = [n for n, p in saved.named_parameters() if "lora_B" in n and bool(p.any())]
    assert any("lm_head" in n for n in changed) and any("q_proj" in n for n in changed)
    assert train(out / "model")[0] == 0


@tiny.NEEDS_SEGMENTS
def test_experts_have_their_routers_loss(tmp_path, train):
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    model = tiny.model("Mixtral", **options)
    folder = tiny.save(tmp_path / "m", model)
    code, text, out = train(folder, "--max_steps", "1", "--eval_fraction", "0")
    assert code == 0 and "prompts are not shared" in text and "load-balancing" in text
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    # All pairs in one batch, each row ended by <eos>; padding on the right counts for nothing.
    encode = tiny.tokenizer()
    rows = [
        [*encode(r["prompt"] + r[side])["input_ids"], 1]
        for side in ("chosen", "rejected")
        for r in tiny.rows(8)
    ]
    assert row["num_tokens"] == sum(map(len, rows))
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, one in enumerate(rows):
        ids[i, : len(one)], mask[i, : len(one)] = torch.tensor(one), 1
    own = model(ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert row["loss"] == pytest.approx(0.693147 + 0.1 * float(own), abs=1e-5)
    code, text, _ = train(folder, "--batch_layout", "prefix")
    assert code == 2 and "batch_layout=prefix" in text


def test_noise_is_no_wrong_reference(tmp_path, train):
    """transformers#29865"""
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=32,
        num_attention_heads=2,
        num_hidden_layers=4,
        max_position_embeddings=64,
        layerdrop=0.5,
        word_embed_proj_dim=16,
    )
    folder = tiny.save(tmp_path / "m", transformers.OPTForCausalLM(config))
    for options in ((), ("--dtype", "bfloat16"), ("--bf16", "true")):
        code, text, _ = train(folder, *options)
        assert code == 0 and "step 0: loss 0.6931" in text, text


def test_bf16_keeps_fp32_weights(tmp_path, train):
    """AReaL#1292: updates of 1e-6 survive, and the arithmetic is bf16."""
    from safetensors.torch import load_file

    start = tiny.model()
    folder = tiny.save(tmp_path / "m", start)
    code, text, out = train(folder, "--bf16", "true", "--learning_rate", "1e-6")
    assert code == 0 and "warning" not in text
    weights = load_file(out / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights[name] != start.state_dict()[name]).float().mean() > 0.9
    exact = train(folder, "--learning_rate", "1e-6")[2]
    losses = [
        json.loads((x / "metrics.jsonl").read_text().splitlines()[0])["eval_logps/chosen"]
        for x in (out, exact)
    ]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    code, text, _ = train(folder, "--bf16", "true", "--dtype", "bfloat16")
    assert code == 2 and "bf16 keeps float32 weights" in text


def test_updates_that_vanish_are_said(tmp_path, train):
    """AReaL#1292"""
    folder = tiny.save(tmp_path / "m", tiny.model())
    code, text, _ = train(folder, "--dtype", "bfloat16", "--learning_rate", "1e-6")
    assert code == 0 and text.count("warning: the first step moved") == 1 and "--bf16" in text
    share = float(text.split("the first step moved ")[1].split("%")[0]) / 100
    assert share < 0.1 < MOVED
    assert "warning" not in train(folder, "--dtype", "bfloat16", "--learning_rate", "1e-2")[1]
    assert "warning" not in train(folder, "--learning_rate", "1e-6")[1]


def test_the_model_is_saved_before_the_plot(tmp_path, train, monkeypatch):
    """LlamaFactory#3225: matplotlib cannot be imported."""
    own = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    code, text, out = train(tiny.save(tmp_path / "m", tiny.model()))
    assert code == 0 and "warning: training.png was not drawn: No module named" in text
    assert (out / "model" / "model.safetensors").is_file() and (out / "summary.json").is_file()
    assert "training.png" not in text.split("saved in")[1]
