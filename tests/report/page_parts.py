"""What tests of pages look at: the elements of a page, and the boxes of a chart's labels."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
EVIL = (
    '</script></style></title><script>fetch("http://evil.example")</script>'
    "<img src=http://evil.example/x.png onerror=alert(1)>\"'&amp;\x00\x1b[31m \u202eturned \ud800"
)

ALLOWED = {
    *("html", "head", "meta", "link", "title", "style", "body", "header", "main", "nav", "footer"),
    *("section", "h1", "h2", "h3", "h4", "p", "b", "a", "dl", "div", "dt", "dd", "pre", "span"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure"),
    *("svg", "g", "path", "text", "rect", "circle"),
}


class Elements(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def stands_alone(page: str) -> None:
    """No script, and nothing that a browser would fetch."""
    found = Elements(page)
    assert {tag for tag, _ in found.tags} <= ALLOWED
    for tag, attrs in found.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data", "xlink:href"):
                assert value == "data:," or str(value).startswith("#"), (tag, value)
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.S))
    assert "url(" not in styles and "@import" not in styles
    assert "default-src 'none'" in page and 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in styles and "white-space: nowrap" in styles


def charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def texts(chart: ElementTree.Element, kind: str = "") -> list[str]:
    return [
        e.text or ""
        for e in chart.iter(f"{SVG}text")
        if not kind or kind in e.get("class", "").split()
    ]


@cache
def text_width(label: str, size: float, bold: bool) -> float:
    """Its width in DejaVu Sans, which is wider than the fonts that systems have."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not label.strip():
        return 0.0
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return float(TextPath((0, 0), label, size=size, prop=font).get_extents().width)


Box = tuple[float, float, float, float, str]


def boxes(chart: ElementTree.Element) -> list[Box]:
    """(left, top, right, bottom, text) of the labels; of a line its figures' height."""
    found = []
    for e in chart.iter(f"{SVG}text"):
        label = e.text or ""
        kinds = e.get("class", "").split()
        size = 12.5 if "title" in kinds else 11.0
        width = text_width(label, size, "title" in kinds or "head" in kinds)
        x, y = float(e.get("x", 0)), float(e.get("y", 0))
        left = {"end": x - width, "middle": x - width / 2}.get(e.get("text-anchor", ""), x)
        found.append((left, y - 0.72 * size, left + width, y + 0.1 * size, label))
    return found


def overlaps(chart: ElementTree.Element) -> list[tuple[str, str]]:
    """Labels that lie on each other, or out of the picture."""
    found = []
    every = boxes(chart)
    for a, b in combinations(every, 2):
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]:
            found.append((a[4], b[4]))
    _, _, width, height = map(float, chart.get("viewBox", "").split())
    for left, top, right, bottom, label in every:
        if left < -1 or top < -1 or right > width + 1 or bottom > height + 1:
            found.append((label, "out of the picture"))
    return found


# --- folders as runs leave them ---


def metrics(n: int, seed: int = 0, change: Callable[[int, Any], None] | None = None) -> Iterator:
    """Rows of metrics.jsonl: n steps, five evaluations."""
    rnd = random.Random(seed)
    for i in range(1, n + 1):
        m = 2 * i / n
        row: dict[str, Any] = {
            "step": i,
            "epoch": i / n,
            "loss": math.log1p(math.exp(-m)) + rnd.gauss(0, 0.1),
            "rewards/chosen": -0.3 * m + rnd.gauss(0, 0.1),
            "rewards/rejected": -1.3 * m,
            "rewards/margins": m + rnd.gauss(0, 0.2),
            "rewards/accuracies": min(1.0, 0.5 + m / 5),
            "logps/chosen": -100 - 3 * m,
            "logps/rejected": -100 - 13 * m,
            "grad_norm": 3.0,
            "learning_rate": 1e-6 * (1 - i / n),
            "tokens_per_s": 9000 + rnd.gauss(0, 100),
            "pairs_per_s": 12.0,
            "step_time": 0.1,
            "padding_saved": 0.4,
            "mem/peak": 2.5,
        }
        if change is not None:
            change(i, row)
        yield row
        if i % max(1, n // 5) == 0:
            yield {
                "step": i,
                "epoch": i / n,
                "eval_loss": math.log1p(math.exp(-m)),
                "eval_rewards/chosen": -0.3 * m,
                "eval_rewards/rejected": -1.3 * m,
                "eval_rewards/margins": m,
                "eval_rewards/accuracies": 0.5 + m / 5,
                "eval_rewards/accuracies_ties_half": 0.5 + m / 5,
                "eval_logps/chosen": -100 - 3 * m,
                "eval_logps/rejected": -100 - 13 * m,
                "eval_logps/accuracies": 0.5,
                "eval_runtime": 1.0,
            }


def make_run(
    folder: Path,
    n: int = 40,
    tail: str = "",
    summary: dict[str, Any] | None = None,
    change: Callable[[int, Any], None] | None = None,
    **config: Any,
) -> Path:
    """The files of a training run."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in metrics(n, len(folder.name), change))
    (folder / "metrics.jsonl").write_text(lines + tail)
    options = {"beta": 0.1, "loss_type": ["sigmoid"], "max_steps": n, **config}
    (folder / "config.yaml").write_text(json.dumps(options))
    (folder / "left_out.jsonl").write_text("")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_iteration(folder: Path, rounds: int = 3, ended: bool = True) -> Path:
    """The files of an iteration; one that is cut off has no summary and half a round."""
    texts_of = [
        {
            "id": str(i),
            "prompt": [{"role": "user", "content": EVIL if i == 0 else f"prompt {i}"}],
            "new": f"<b>new</b> {i}",
            "old": f"old {i}",
            "p_first": 0.75,
            "tie": i == 1,
            "error": None,
        }
        for i in range(3)
    ]
    for number in range(rounds + 1):
        stages: dict[str, Any] = {
            "evaluate": {
                "measures": {"length": 100.0, "diversity": 0.9, "repetition": 0.1},
                "seconds": 1.0,
            }
        }
        if number:
            win = {"rate": 0.5 + number / 20, "low": 0.4, "high": 0.8, "prompts": 40}
            stages["evaluate"]["measures"] |= {"kl/exact": 2.0 * number, "kl/k3": 2.1 * number}
            stages["evaluate"] |= {"win_rate_round0": win, "win_rate_previous": win}
            stages["judge"] = {
                "judge": "callable:rule",
                "verdicts": 64,
                "ties": 6,
                "errors": 1,
                "first_error": EVIL,
                "seconds": 2.0,
            }
            stages["pairs"] = {"pairs": 57, "dropped": {"ties": 6}, "log_length_ratio": 0.1}
        if number == rounds and not ended:
            del stages["evaluate"]
        path = folder / "rounds" / f"{number:03d}"
        path.mkdir(parents=True)
        facts = {"round": number, "promoted": "evaluate" in stages, "ended": None}
        (path / "manifest.json").write_text(json.dumps({**facts, "stages": stages}))
        if number:
            lines = "".join(json.dumps(t) + "\n" for t in texts_of)
            (path / "wins_round0.jsonl").write_text(lines)
            make_run(path / "train", 4)
    (folder / "config.json").write_text(json.dumps({"loop": {"rounds": rounds}, "training": {}}))
    if ended:
        (folder / "summary.json").write_text(json.dumps({"ended": f"rounds: {rounds} done"}))
    return folder
