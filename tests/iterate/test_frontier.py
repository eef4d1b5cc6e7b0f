"""`benchmarks/frontier.py` at the size of a test: lines that resume, fused beside plain torch."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the frontier's model is transformers'")

FILE = Path(__file__).parents[2] / "benchmarks" / "frontier.py"
WORDS = ["the", "film", "is", "a", "good", "bad", "dull", "fine", "plot", "with", "very", "warm"]


class Analyzer:
    """In VADER's place: the same call, a score of two words."""

    def polarity_scores(self, text: str) -> dict[str, float]:
        words = text.split()
        return {"compound": float(words.count("good") - words.count("bad"))}


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> Any:
    vader = types.ModuleType("vaderSentiment.vaderSentiment")
    vader.SentimentIntensityAnalyzer = Analyzer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", vader)
    monkeypatch.syspath_prepend(str(FILE.parent))
    spec = importlib.util.spec_from_file_location("frontier", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "frontier", module)  # its dataclass looks there
    spec.loader.exec_module(module)
    small = {"BEGINNINGS": 12, "SAMPLES": 3, "HELD": 8, "STEPS": 6, "PAIRS": 4, "POINT": 2}
    for name, value in {**small, "NEW": 5}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_lines_resume_and_paths_agree(frontier: Any, tmp_path: Path) -> None:
    n = len(WORDS)
    texts = [" ".join(WORDS[(i * 5 + k * (i % 3 + 1)) % n] for k in range(9)) for i in range(120)]
    (tmp_path / "s.txt").write_text("\n".join(texts))
    runs = [
        frontier.Run(mode, beta, 0, path)
        for path in ("fused", "plain")
        for beta in (0.1, 1.0)
        for mode in ("offline", "iterative")
    ]
    folder = tmp_path / "out"
    first = frontier.Work(folder, tmp_path / "s.txt", 30.0).run(runs[:3])
    assert len(first) == 4 and first[0]["mode"] == "start"
    whole = (folder / "frontier.jsonl").read_text()
    # Killed while it wrote the last line: that one is done again, the others are not.
    (folder / "frontier.jsonl").write_text(whole[:-20])
    rows = frontier.Work(folder, tmp_path / "s.txt", 30.0).run(runs)
    kept = [json.loads(line) for line in whole.splitlines()]
    assert rows[:3] == kept[:3] and len(rows) == 9
    assert rows[3]["points"] == kept[3]["points"]  # the same seed, the same line
    assert all([p["step"] for p in row["points"]] == [2, 4, 6] for row in rows[1:])
    text = "\n".join(frontier.conclusions(rows))
    assert "at equal KL" in text or "KL falls" in text
    gap = float(text.rpartition("differ by at most ")[2])
    assert gap < 0.5  # sampled texts: a token that falls otherwise moves a mean of eight
    pytest.importorskip("matplotlib", reason="the chart")
    frontier.draw(rows, folder / "frontier.png")
    assert (folder / "frontier.png").stat().st_size > 1000
