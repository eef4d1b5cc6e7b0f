"""`make large-data`: a file of 2,000,000 pairs, checked and trained on, with time and memory.

    python tools/large_data.py [--rows N] [--folder DIR] [--packed] [--short]

The model is tiny, so what is measured is the data: seconds from the start of `train` to its first
step, beyond those of the same run on ten rows, and the peak of the resident memory beyond that run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ["the", "of", "and", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are"]


def write_pairs(path: Path, rows: int, short: bool = False) -> None:
    """`rows` pairs of 30 to 60 words, or of 3 to 6."""
    draw = random.Random(1)
    sizes = (1, 3) if short else (8, 24)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(*sizes))) for _ in range(5000)]
    with gzip.open(path, "wt", 1) if path.suffix == ".gz" else path.open("w") as file:
        for i in range(rows):
            prompt, chosen, rejected = (texts[draw.randrange(5000)] for _ in range(3))
            row = {"prompt": f"{i}: {prompt}", "chosen": f" {chosen} a", "rejected": f" {rejected}"}
            file.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> None:
    """A tiny Llama with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=1024,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def watched(args: list[str], until: str = "") -> tuple[float, float, str]:
    """(seconds until a line with `until`, peak resident GiB of the command, its output)."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_kernels", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    lines, seconds, peak = [], 0.0, 0
    for line in process.stdout:
        lines.append(line)
        peak = max(peak, _peak(process.pid))
        if until and until in line and not seconds:
            seconds = time.perf_counter() - began
    process.wait()
    return seconds or time.perf_counter() - began, peak / 2**20, "".join(lines)


def _peak(pid: int) -> int:
    """KiB of the highest resident set so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--packed", action="store_true", help="with gzip")
    parser.add_argument("--short", action="store_true", help="rows of a few words")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        model, large, small = folder / "model", folder / "large.jsonl", folder / "small.jsonl"
        large = large.with_suffix(".jsonl.gz") if options.packed else large
        write_model(model)
        write_pairs(large, options.rows, options.short)
        write_pairs(small, 10)
        size = large.stat().st_size / 2**20
        print(f"{options.rows:,} rows, {size:,.0f} MiB", flush=True)
        times, peaks = {}, {}
        for file in (small, large):
            run = ["train", "--model_name_or_path", str(model), "--dataset_name", str(file)]
            run += ["--device", "cpu", "--max_steps", "2", "--logging_steps", "1"]
            run += ["--sample_max_new_tokens", "0", "--output_dir", str(folder / file.stem)]
            run += [
                "--reference_cache",
                str(folder / "cache"),
                "--per_device_eval_batch_size",
                "32",
            ]
            run += ["--per_device_train_batch_size", "4"]
            seconds, peak, text = watched(run, "step 1/2")
            times[file], peaks[file] = seconds, peak
            if "step 1/2" not in text:
                print(text)
                return 1
        print(
            f"train: first step after {times[large]:.1f} s, {times[large] - times[small]:.1f} s "
            f"beyond ten rows; peak {peaks[large]:.2f} GiB, "
            f"{peaks[large] - peaks[small]:.2f} GiB beyond ten rows",
            flush=True,
        )
        for extra in (["--near", "false"], []):
            seconds, peak, text = watched(["data", "check", str(large), *extra])
            print(
                f"data check {' '.join(extra)}: {seconds:.0f} s, peak {peak:.2f} GiB; "
                f"{text.strip().splitlines()[-1]}",
                flush=True,
            )
        good = times[large] - times[small] < 60 and peaks[large] - peaks[small] < 2
        print("within 60 s and 2 GiB" if good else "NOT within 60 s and 2 GiB")
        return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
