"""Runs of other packages' own training commands, as they are and below `dpo-kernels run`.

One tiny model with a large vocabulary (the logits are what is measured), 60 pairs, one thread.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny

ROOT = Path(__file__).parent.parent.parent
PROBE = Path(__file__).parent / "probe"
VOCABULARY = 32000
PAIRS = 60


def pairs() -> list[dict[str, str]]:
    """60 pairs of words, of different lengths."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(tiny.WORDS)}" for _ in range(rng.randint(low, high)))

    return [
        {"prompt": text(8, 24), "chosen": " " + text(20, 60), "rejected": " " + text(20, 60)}
        for _ in range(PAIRS)
    ]


def write_model(folder: Path, **options: Any) -> str:
    """A folder that every client loads by its name; some want a chat template."""
    size = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}
    tiny.save(folder, tiny.model(vocab_size=VOCABULARY, **size, **options))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def write_json(file: Path, value: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1))
    return str(file)


def run(command: list[str], folder: Path, fused: bool, *options: str, ok: bool = True) -> dict:
    """What the probe saw of a command (`log`: what it printed), plain or fused."""
    folder.mkdir(parents=True, exist_ok=True)
    seen, log = folder / "probe.json", folder / "log"
    if seen.exists():
        seen.unlink()
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program is not None, command[0]
    whole = [program, *command[1:]]
    if fused:
        whole = [sys.executable, "-m", "dpo_kernels", "run", *options, "--", *whole]
    with log.open("w") as out:
        done = subprocess.run(
            whole,
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(PROBE), str(ROOT)]),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "CLIENT_PROBE": str(seen),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
    text = log.read_text()
    assert (done.returncode == 0) is ok, text[-4000:]
    return {**(json.loads(seen.read_text()) if seen.exists() else {}), "log": text}


def worst(a: list[float], b: list[float]) -> float:
    """The largest difference of two runs' losses, relative where a loss is above 1."""
    assert len(a) == len(b) > 0
    return max(abs(x - y) / max(1.0, abs(x)) for x, y in zip(a, b, strict=True))


def record(case: str, plain: dict, fused: dict) -> None:
    """Leave a line of the table of docs/integrations-tested.md, where CLIENT_RECORD asks for it."""
    if path := os.environ.get("CLIENT_RECORD"):
        row = {
            "case": case,
            "steps": len(fused["losses"]),
            "calls": fused["fused_calls"],
            "trunk": ", ".join(x.removeprefix("torch.") for x in fused["trunk"]),
            "difference": worst(plain["losses"], fused["losses"]),
            "memory": plain["kilobytes"] / fused["kilobytes"],
            "time": plain["seconds"] / fused["seconds"],
            "cpu": plain["cpu_seconds"] / fused["cpu_seconds"],
            "megabytes": [plain["kilobytes"] / 1024, fused["kilobytes"] / 1024],
        }
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
