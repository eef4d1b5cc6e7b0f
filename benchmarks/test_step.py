"""A whole training step, in turns: TRL as it is, patched with padded rows, patched, our own loop.

    pytest benchmarks/test_step.py [--full] [--results FILE]
    python benchmarks/test_step.py --json FILE [--shape SmolLM2-135M] [--rounds 3] [--limit_mb 2000]

Random models of named shapes, ragged lengths, the prompt 1/4, 1/2 and 3/4 of the tokens. Of each
way: tokens that the policy's trunk computes a step, seconds (the median of all steps but the
first), peak memory of training, losses; with `--limit_mb` the longest pair that trains within so
much memory. Each run is a process of its own. It needs TRL; on a GPU see `gpu_figures.py layouts`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import compare_trl  # noqa: E402

from dpo_kernels.bench.results import describe  # noqa: E402

# name -> (hidden size, layers, vocabulary); few layers, so that a step takes seconds
SHAPES = {
    "SmolLM2-135M": (576, 6, 49152),
    "Llama-3 vocabulary": (576, 4, 128256),
    "long trunk": (576, 12, 8192),
}
TOKENS = 384  # of a sequence, on average
PROMPTS = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
WAYS: dict[str, str | None] = {
    "TRL": None,
    "patch_trl(layout='padded')": "layout='padded'",
    "patch_trl()": "",
    "our loop": "ours",
}


def arguments(shape: str, prompt: float, pairs: int, steps: int) -> list[str]:
    hidden, layers, vocabulary = SHAPES[shape]
    sizes = {
        "prompt": round(TOKENS * prompt),
        "completion": round(TOKENS * (1 - prompt)),
        "pairs": pairs,
        "steps": steps,
        "layers": layers,
        "hidden": hidden,
        "vocabulary": vocabulary,
    }
    return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def run(way: str | None, options: list[str], threads: int) -> dict[str, Any]:
    """One way's own measurement, from a fresh process."""
    options = [*options, "--threads", str(threads)]
    if way != "ours":
        return compare_trl.run(way, options, threads)
    command = [sys.executable, str(HERE / "loop_script.py"), *options]
    path = os.pathsep.join(p for p in (str(HERE.parent), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{command[1]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(shape: str, prompt: float, rounds: int, pairs: int, steps: int, threads: int) -> dict:
    """A row for each way; they run in turns, so that other work on the machine meets all."""
    options = arguments(shape, prompt, pairs, steps)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            runs[name].append(run(way, options, threads))
    rows = {}
    for name, each in runs.items():
        rows[name] = {
            "tokens": statistics.median(r["tokens"] for r in each),
            "seconds": statistics.median(s for r in each for s in r["seconds"][1:]),
            "cpu_seconds": statistics.median(s for r in each for s in r["cpu_seconds"][1:]),
            "training_mb": statistics.median(r["peak_mb"] - r["peak_before_mb"] for r in each),
            "losses": each[0]["losses"],
        }
    base = rows["TRL"]
    return {
        name: {
            **row,
            "of TRL": base["seconds"] / row["seconds"],
            "CPU of TRL": base["cpu_seconds"] / row["cpu_seconds"],
        }
        for name, row in rows.items()
    }


def longest(way: str | None, shape: str, limit_mb: int, threads: int) -> int:
    """Mean tokens, a power of two, of the longest sequences that train within `limit_mb`."""
    hidden, layers, vocabulary = SHAPES[shape]
    fits, length = 0, 256
    while length <= 1 << 15:
        sizes = ["--prompt", str(length // 2), "--completion", str(length // 2), "--pairs", "1"]
        model = ["--layers", str(layers), "--hidden", str(hidden), "--vocabulary", str(vocabulary)]
        most = ["--max_length", str(2 * length)] if way != "ours" else []
        found = run(way, [*sizes, *model, *most, "--steps", "2"], threads)
        if found["peak_mb"] - found["peak_before_mb"] > limit_mb:
            break
        fits, length = length, 2 * length
    return fits


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_step(shape: str, prompt: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("trl", reason="pip install trl")
    full = request.config.getoption("--full")
    rows = compare(shape, PROMPTS[prompt], 3 if full else 1, 4, 3, 2)
    for name, row in rows.items():
        print(f"{shape}, prompt {prompt}, {name}: {json.dumps(row)}")
    assert rows["patch_trl()"]["losses"] == pytest.approx(rows["TRL"]["losses"], abs=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--prompt", choices=PROMPTS, action="append", help="its share of tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit_mb", type=int, help="find the longest pair within so much memory")
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    about = describe() | {"format": "dpo-kernels step 1", "threads": given.threads}

    def keep() -> None:
        """After each part: the whole takes an hour."""
        if given.json:
            given.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")

    for shape in given.shape or SHAPES:
        for name in given.prompt or PROMPTS:
            rows = compare(
                shape, PROMPTS[name], given.rounds, given.pairs, given.steps, given.threads
            )
            results[f"{shape}, prompt {name}"] = rows
            print(f"\n{shape}, prompt {name} of {TOKENS} tokens, {given.pairs} pairs a step\n")
            print(
                "| | tokens a step | s/step | of TRL | CPU s/step | of TRL | MB of training |\n"
                + "|---" * 7
                + "|"
            )
            for way, row in rows.items():
                print(
                    f"| {way} | {row['tokens']:.0f} | {row['seconds']:.3f} | "
                    f"{row['of TRL']:.2f}x | {row['cpu_seconds']:.2f} | "
                    f"{row['CPU of TRL']:.2f}x | {row['training_mb']:.0f} |",
                    flush=True,
                )
            keep()
        if given.limit_mb:
            found = {n: longest(w, shape, given.limit_mb, given.threads) for n, w in WAYS.items()}
            results[f"{shape}, longest pair within {given.limit_mb} MB"] = found
            print(f"\nlongest pair within {given.limit_mb} MB: {found}")
            keep()


if __name__ == "__main__":
    main()
