"""TRL's own tests of its DPOTrainer, with `patch_trl()` on: those that need no download.

    python tools/trl_suite.py PATH_TO_A_TRL_CHECKOUT [--plain] [pytest options]

TRL's wheels and source distributions hold no tests: a checkout of the installed version is needed.
The patch is as `patch_trl()` has it by default: rows are packed and prompts shared. `--plain`
leaves it out, to see what TRL itself does with these models.
Its tests name models and data of a hub. Here the same relative names are folders, made from
configurations with random weights and from a few rows of text, which the loaders prefer to the hub.
What these cannot stand for (vision models, templates of one model, quantised ones) is left out by
name, below.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HUB = "trl-internal-testing"
# Tests of models, data or packages that are not here; the rest of the class runs.
LEFT_OUT = (
    "VLM or Vision or gpt_oss or trust_remote_code or toolcall or quantization or liger or Slow"
    " or chat_template_kwargs"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Model of TRL's tests -> configuration class and what is not common to all.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {}),
    "tiny-Qwen3MoeForCausalLM": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 8,
            "output_router_logits": True,
        },
    ),
    "tiny-Cohere2ForCausalLM": ("Cohere2", {"logit_scale": 0.25}),
    "tiny-Olmo3ForCausalLM": ("Olmo3", {}),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4Moe",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}
TOPICS = [
    "Beautiful is better than",
    "Explicit is better than",
    "Simple is better than",
    "Complex is better than",
    "Flat is better than",
    "Sparse is better than",
    "Readability",
    "Special cases aren't special enough to",
]
GOOD = [
    " ugly.",
    " implicit.",
    " complex.",
    " complicated.",
    " nested.",
    " dense.",
    " counts.",
    " break the rules.",
]
BAD = [
    " the moon.",
    " nothing at all.",
    " a cat.",
    " water.",
    " it looks.",
    " a stone.",
    " does not.",
    " be simple.",
]


def tokenizer() -> Any:
    """Bytes, ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*special, *alphabet])}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=special[0],
        eos_token=special[2],
        additional_special_tokens=special[1:2],
    )
    wrapped.chat_template = CHATML
    return wrapped


def make_models(folder: Path) -> None:
    import torch
    import transformers

    words = tokenizer()
    for name, (kind, extra) in MODELS.items():
        common = dict(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
            dtype="float32",
        )
        try:
            config = getattr(transformers, f"{kind}Config")(**{**common, **extra})
            torch.manual_seed(0)
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
        except Exception as error:
            print(f"{name} cannot be made with this transformers: {error}")
            continue
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def make_data(folder: Path) -> None:
    """The preference forms of TRL's data set, explicit and implicit prompts, texts and messages."""

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text.strip()}]

    texts = list(zip(TOPICS, GOOD, BAD, strict=True))
    forms = {
        "standard_preference": [{"prompt": p, "chosen": g, "rejected": b} for p, g, b in texts],
        "standard_implicit_prompt_preference": [
            {"chosen": p + g, "rejected": p + b} for p, g, b in texts
        ],
        "conversational_preference": [
            {
                "prompt": said("user", p),
                "chosen": said("assistant", g),
                "rejected": said("assistant", b),
            }
            for p, g, b in texts
        ],
        "conversational_implicit_prompt_preference": [
            {
                "chosen": said("user", p) + said("assistant", g),
                "rejected": said("user", p) + said("assistant", b),
            }
            for p, g, b in texts
        ],
    }
    zen = folder / "zen"
    zen.mkdir(parents=True)
    lines = ["---", "configs:"]
    for name, rows in forms.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, part in (("train", rows * 2), ("test", rows[:4])):
            file = zen / f"{name}-{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in part))
            lines += [f"  - split: {split}", f"    path: {file.name}"]
    (zen / "README.md").write_text("\n".join([*lines, "---", ""]))


PATCH = """from dpo_kernels.integrations.trl import patch_trl
from dpo_kernels.models import layouts
patch_trl()
calls, run_call = [], layouts.run_call


def counted(model, trunk, call, *args, **kwargs):
    calls.append(call.segments is not None)
    return run_call(model, trunk, call, *args, **kwargs)


from dpo_kernels.models import attached
attached.run_call = counted


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{sum(calls)} forwards of packed rows")
"""
PLUGIN = """
import pytest
import torch
import trl

if not torch.cuda.is_available():  # bf16 is TRL's default, which transformers refuses on a CPU
    made = trl.DPOConfig.__init__
    trl.DPOConfig.__init__ = lambda self, *a, **k: made(self, *a, **{"bf16": False, **k})
{patch}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    outcome = yield
    error = outcome.excinfo and outcome.excinfo[1]
    if isinstance(error, OSError) and "couldn't connect" in str(error):
        outcome.force_exception(pytest.skip.Exception("needs a model that is downloaded"))
"""


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    checkout = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder / HUB)
        make_data(folder / HUB)
        suite = folder / "tests"
        suite.mkdir()
        for file in (checkout / "tests").glob("*.py"):
            if not file.name.startswith("test_") or file.name == "test_dpo_trainer.py":
                shutil.copy(file, suite)
        (suite / "__init__.py").touch()
        options = [word for word in sys.argv[2:] if word != "--plain"]
        patch = "" if "--plain" in sys.argv else PATCH
        (folder / "patch_plugin.py").write_text(PLUGIN.replace("{patch}", patch))
        given = os.environ.get("PYTHONPATH")  # where the TRL of the checkout may be
        path = os.pathsep.join([str(ROOT), name, *([given] if given else [])])
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "patch_plugin",
                "-q",
                "-W",
                "ignore",
                "tests/test_dpo_trainer.py",
                "-k",
                f"not ({LEFT_OUT})",
                *options,
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": name},
        )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
