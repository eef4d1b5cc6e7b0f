"""`judge eval`: how far a judge can be trusted, on pairs with a known answer.

Agreement counts a tie as one half; errors are left out of it and have their own rate. Swap
consistency is the share of questions whose two orders agree: a judge that always says "first" has
none, and all of its verdicts are ties. Length bias is how much more often the longer text is
preferred than it is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.left_out import DataError
from .judges import Judge
from .records import PairItem, Verdict, completion_text, is_turn, read_table, write_table


@dataclass(frozen=True)
class LabelledPair:
    item: PairItem
    label: int  # 1 or 2
    subset: str


@dataclass(frozen=True)
class JudgeQuality:
    """Rates of one subset; None where there is nothing to count."""

    subset: str
    pairs: int
    agreement: float | None
    agreement_low: float | None  # 95 % interval (Wilson)
    agreement_high: float | None
    decided: float | None  # agreement where the judge decides
    consistency: float | None  # both orders agree; None: judged in one order
    says_first: float | None  # of the inconsistent: the one shown first both times
    ties: float
    errors: float
    length_bias: float | None


def read_labelled(path: str | Path) -> list[LabelledPair]:
    """Rows {prompt, output_1, output_2, label}; label 1 or 2."""
    found = []
    for n, row in enumerate(read_table(path), start=1):
        where = f"{path}: row {n}"
        for name in ("prompt", "output_1", "output_2"):
            if not is_turn(row.get(name)):
                raise DataError(f"{where}: {name}: missing or no text")
        if row.get("label") not in (1, 2) or isinstance(row["label"], bool):
            raise DataError(f"{where}: label: {row.get('label')!r}, expected 1 or 2")
        item = PairItem(
            row["prompt"], completion_text(row["output_1"]), completion_text(row["output_2"])
        )
        found.append(LabelledPair(item, row["label"], str(row.get("subset") or "all")))
    if not found:
        raise DataError(f"{path}: no row")
    return found


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share; half successes (ties) count as such."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def quality(
    subset: str, pairs: Sequence[LabelledPair], verdicts: Sequence[Verdict]
) -> JudgeQuality:
    """The rates of these verdicts."""
    read = [(p, v) for p, v in zip(pairs, verdicts, strict=True) if v.p_first is not None]
    right = 0.0
    decided = decided_right = swapped = inconsistent = first = 0
    longer = longer_right = unequal = 0
    for pair, v in read:
        says = 0 if v.tie else 1 if (v.p_first or 0) > 0.5 else 2
        right += 0.5 if says == 0 else float(says == pair.label)
        decided += says != 0
        decided_right += says == pair.label
        if v.order == "both":
            swapped += 1
            inconsistent += v.position is not None
            first += v.position == 1
        lengths = len(pair.item.first), len(pair.item.second)
        if says and lengths[0] != lengths[1]:
            unequal += 1
            longer += says == (1 if lengths[0] > lengths[1] else 2)
            longer_right += pair.label == (1 if lengths[0] > lengths[1] else 2)
    n = len(read)
    low, high = wilson(right, n) if n else (None, None)
    return JudgeQuality(
        subset,
        len(pairs),
        right / n if n else None,
        low,
        high,
        decided_right / decided if decided else None,
        1 - inconsistent / swapped if swapped else None,
        first / inconsistent if inconsistent else None,
        sum(v.tie for v in verdicts) / len(pairs),
        1 - n / len(pairs),
        (longer - longer_right) / unequal if unequal else None,
    )


def evaluate_judge(
    judge: Judge, pairs: Sequence[LabelledPair], folder: Path | None = None
) -> list[JudgeQuality]:
    """The rates of all pairs and of each subset; files and a chart in `folder` if given."""
    verdicts: list[Verdict] = []
    for start in range(0, len(pairs), judge.batch):
        verdicts += judge.compare([p.item for p in pairs[start : start + judge.batch]])
    table = [quality("all", pairs, verdicts)]
    subsets = sorted({p.subset for p in pairs})
    for subset in subsets if len(subsets) > 1 else []:
        index = [i for i, p in enumerate(pairs) if p.subset == subset]
        table.append(quality(subset, [pairs[i] for i in index], [verdicts[i] for i in index]))
    if folder is not None:
        write_table(
            folder / "judge_eval.jsonl", [{"judge": judge.name, **asdict(q)} for q in table]
        )
        write_table(
            folder / "verdicts.jsonl",
            [
                {
                    "row": i,
                    "label": p.label,
                    "p_first": v.p_first,
                    "tie": v.tie,
                    "error": v.error,
                    "judge": judge.name,
                    "order": v.order,
                    "raw": v.raw,
                }
                for i, (p, v) in enumerate(zip(pairs, verdicts, strict=True), start=1)
            ],
        )
    return table


_COLUMNS = (
    ("agreement", "agreement"),
    ("decided", "decided"),
    ("consistency", "swap"),
    ("says_first", "says first"),
    ("ties", "ties"),
    ("errors", "errors"),
    ("length_bias", "length bias"),
)


def eval_table(table: Sequence[JudgeQuality]) -> str:
    """The rates as lines of text."""
    head = f"{'subset':<24}{'pairs':>6}" + "".join(f"{title:>13}" for _, title in _COLUMNS)
    lines = [head]
    for q in table:
        cells = "".join(f"{_shown(getattr(q, name)):>13}" for name, _ in _COLUMNS)
        lines.append(f"{q.subset:<24}{q.pairs:>6}{cells}")
    q = table[0]
    if q.agreement is not None:
        lines.append(
            f"agreement of all: {q.agreement:.3f} [{q.agreement_low:.3f}, {q.agreement_high:.3f}], "
            "a tie counts one half, errors are left out"
        )
    if q.consistency is not None and q.consistency < 0.1:
        lines.append(
            "the two orders almost never agree: this judge looks at the position, not at the texts"
        )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def plot_eval(table: Sequence[JudgeQuality], path: Path, title: str) -> None:
    """Agreement with its interval, swap consistency, ties and errors of each subset."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.7 * len(table)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    series = (
        ("agreement", "agreement"),
        ("consistency", "swap consistency"),
        ("ties", "ties"),
        ("errors", "errors"),
    )
    for k, (name, label) in enumerate(series):
        y = [i + 0.2 * (k - 1.5) for i in range(len(table))]
        values = [getattr(q, name) or 0.0 for q in table]
        spread = None
        if name == "agreement":
            spread = [
                [
                    v - (q.agreement_low or 0.0) if q.agreement is not None else 0.0
                    for q, v in zip(table, values, strict=True)
                ],
                [
                    (q.agreement_high or 0.0) - v if q.agreement is not None else 0.0
                    for q, v in zip(table, values, strict=True)
                ],
            ]
        axis.barh(y, values, height=0.18, label=label, xerr=spread, capsize=2)
    axis.axvline(0.5, color="grey", lw=0.8, ls=":")
    axis.set_yticks(range(len(table)), [f"{q.subset} ({q.pairs})" for q in table])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_title(title)
    axis.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)
