"""`sweep`: each combination once, its table and its chart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_policy import chat, save_tiny

from dpo_kernels.cli import main
from dpo_kernels.iterate.records import write_table

pytest.importorskip("transformers", reason="the trainer needs transformers")


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = save_tiny(tmp_path / "policy")
    rows = [
        {
            "prompt": chat(f"place {i}"),
            **{k: [{"role": "assistant", "content": f"{k} {i}"}] for k in ("chosen", "rejected")},
        }
        for i in range(12)
    ]
    write_table(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "sweep"
    command = [
        "sweep",
        "--betas",
        "0.1",
        "0.5",
        "--pair_counts",
        "6",
        "12",
        "--output_dir",
        str(out),
        "--model_name_or_path",
        policy,
        "--dataset_name",
        str(tmp_path / "pairs.jsonl"),
        "--max_steps",
        "1",
        "--learning_rate",
        "1e-3",
        "--sample_max_new_tokens",
        "0",
        "--device",
        "cpu",
        "--save_steps",
        "0",
    ]
    assert main(command) == 0
    assert "reward accuracy" in capsys.readouterr().out
    found = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [r["point"] for r in found] == [
        {"beta": b, "num_pairs": n} for b in (0.1, 0.5) for n in (6, 12)
    ]
    assert (out / "sweep.png").stat().st_size > 1000
    times = {f: f.stat().st_mtime_ns for f in out.glob("*/summary.json")}
    assert len(times) == 4 and main(command) == 0
    assert times == {f: f.stat().st_mtime_ns for f in out.glob("*/summary.json")}
    # Every set has the same pairs held out.
    held = (out / "held-out.jsonl").read_text().splitlines()
    small, large = ((out / f"pairs-{n}.jsonl").read_text().splitlines() for n in (6, 12))
    assert len(held) == 1 and set(small) < set(large) and not set(held) & set(large)
    assert (len(small), len(large)) == (5, 11)
    changes = (
        (["--pair_counts", "99", "--output_dir", str(tmp_path / "new")], "99 of 12"),
        (["--pair_counts", "1"], "2"),
        (["--learning_rate", "0.5"], "learning_rate is 0.5, but the runs in"),
    )
    for change, message in changes:
        assert main([*command, *change]) == 2
        assert message in capsys.readouterr().err
    assert main(["sweep", "--output_dir", str(out)]) == 2
    assert "--betas" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text() + "\n")
    assert main(command) == 2
    assert "dataset_name (its content)" in capsys.readouterr().err
