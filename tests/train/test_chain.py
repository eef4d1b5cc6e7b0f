"""The chain of docs/training.md from its own files: SFT, DPO, score, report, a small model."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from test_cli import chats, model, run  # noqa: F401 (model is a fixture)
from test_data import bot, user, write
from test_train import one_thread  # noqa: F401

pytest.importorskip("transformers", reason="the trainer needs transformers")

DOC = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_chain_of_the_page(
    model: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files as they stand there; model, lengths and steps are a small machine's."""
    blocks = re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", DOC.read_text(), re.S)
    files = {name: yaml.safe_load(text) for name, text in blocks}
    monkeypatch.chdir(tmp_path)
    write(Path("chats.jsonl"), [{"messages": [user(f"q {i}"), bot("an answer")]} for i in range(9)])
    write(Path("pairs.jsonl"), chats(9))
    small = {"max_length": 128, "max_steps": 2, "per_device_train_batch_size": 2, "device": "cpu"}
    files["sft.yaml"] |= {**small, "model_name_or_path": model, "sample_max_new_tokens": 4}
    files["dpo.yaml"] |= {**small, "eval_steps": 1, "sample_max_new_tokens": 4}
    files["dpo.yaml"]["use_peft"] = importlib.util.find_spec("peft") is not None
    files["score.yaml"] |= {"max_length": 128, "device": "cpu"}
    for command, name in (
        ("sft", "sft.yaml"),
        ("train", "dpo.yaml"),
        ("score", "score.yaml"),
        ("report", "report.yaml"),
    ):
        Path(name).write_text(yaml.safe_dump(files[name]))
        assert run(command, name) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in Path("runs/smollm2/scores.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and all("margins" in row for row in rows)
    # A row that the run did not visit is computed; the others are its cache's.
    assert re.search(r"reference: [1-9] rows from the cache", capsys.readouterr().out)
    page = Path("runs/smollm2/report.html").read_text()
    assert "DPO: sigmoid" in page and 'id="curves"' in page
    for folder in ("sft", "dpo"):
        assert Path(f"runs/smollm2/{folder}/report.html").exists()
