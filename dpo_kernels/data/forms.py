"""Rows in the forms that other projects write, turned into {prompt, chosen, rejected}.

    {"instruction", "input", "chosen", "rejected"}                   LLaMA-Factory (alpaca)
    {"conversations": [{"from", "value"}], "chosen", "rejected"}     LLaMA-Factory (ShareGPT)
    {"context", "completions": [{"rank", "completion"}]}             NeMo-RL
    {"prompt", "output_A", "output_B", "label": 1 | 0}               HALOs: 1, A is preferred
    {"prompt", "output_1", "output_2", "label": 1 | 2}               `judge eval`
    {"prompt", "completions" | "responses": [...], "scores" | "rewards" | "ranks": [...]}

The last is a ranked list of K: its best and its worst are the pair (larger scores and smaller ranks
are better). A tie of the two is refused: it prefers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .csv_rows import plain_columns
from .left_out import BadField, listed
from .row import Row, kind_of

_LISTS = ("completions", "responses")
_SCORES = ("scores", "rewards", "ranks")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


def named(header: list[str], rename: Mapping[str, str]) -> list[str]:
    """What the names of a CSV header mean; `ValueError` for one of no form that is known."""
    ours = [rename.get(name, name) for name in header]
    if len(set(ours)) == len(ours) and form_of(dict.fromkeys(ours)) is not None:
        return ours
    return plain_columns(ours)


def form_of(row: Mapping[str, Any]) -> str | None:
    """The name of a row's form by its columns; None: prompt, chosen and rejected as they stand."""
    if "output_A" in row and "output_B" in row:
        return "output_AB"
    if "output_1" in row and "output_2" in row:
        return "output_12"
    if "chosen" in row or "rejected" in row:
        if "conversations" in row:
            return "sharegpt"
        if "instruction" in row and "input" in row and "prompt" not in row:
            return "alpaca"
        return None
    if any(name in row for name in _LISTS):
        return "ranked"
    if ("output" in row or "completion" in row) and "label" in row:
        return "binary"
    return None


def as_pair(row: Row) -> tuple[Row, str | None]:
    """(the row as {prompt, chosen, rejected, ...}, its form); `BadField` where it makes no pair."""
    form = form_of(row)
    return (row, None) if form is None else (_MAKERS[form](dict(row)), form)


def _alpaca(row: Row) -> Row:
    asked, more = row.pop("instruction"), row.pop("input")
    if not isinstance(asked, str) or not (more is None or isinstance(more, str)):
        raise BadField("instruction", kind_of(asked), "a text", "mis-typed field")
    turns: list[Any] = [{"role": "user", "content": f"{asked}\n{more}" if more else asked}]
    history = row.pop("history", None) or []
    if not isinstance(history, list):
        raise BadField("history", kind_of(history), "a list of turns", "mis-typed field")
    for past in reversed(history):
        if not (isinstance(past, list) and len(past) == 2):
            raise BadField("history", kind_of(past), "[question, answer]", "mis-typed field")
        turns = [
            {"role": "user", "content": past[0]},
            {"role": "assistant", "content": past[1]},
            *turns,
        ]
    return {**row, "prompt": turns, **{s: _said(row, s) for s in ("chosen", "rejected")}}


def _said(row: Row, name: str) -> Any:
    """A completion that may be a text: then it is the assistant's."""
    value = row.get(name)
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _sharegpt(row: Row) -> Row:
    prompt = _speakers("conversations", row.pop("conversations"))
    sides = {}
    for name in ("chosen", "rejected"):
        value = row.get(name)
        sides[name] = _speakers(name, value if isinstance(value, list) else [value])
    return {**row, "prompt": prompt, **sides}


def _speakers(name: str, turns: Any) -> list[Any]:
    if not isinstance(turns, list):
        raise BadField(name, kind_of(turns), "a list of {from, value}", "mis-typed field")
    found = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadField(f"{name}[{i}]", kind_of(turn), "{from, value}", "mis-typed field")
        if "from" not in turn:
            found.append(turn)
            continue
        who = turn["from"]
        if not isinstance(who, str) or who not in _SPEAKERS:
            raise BadField(
                f"{name}[{i}].from", repr(who), f"one of {', '.join(_SPEAKERS)}", "unknown role"
            )
        found.append({"role": _SPEAKERS[who], "content": turn.get("value")})
    return found


def _output_ab(row: Row) -> Row:
    return _labelled(row, "output_A", "output_B", {1: True, 0: False, "A": True, "B": False})


def _output_12(row: Row) -> Row:
    return _labelled(row, "output_1", "output_2", {1: True, 2: False})


def _labelled(row: Row, first: str, second: str, labels: dict[Any, bool]) -> Row:
    a, b, label = row.pop(first), row.pop(second), row.pop("label", None)
    known = not isinstance(label, bool | list | dict) and label in labels
    if not known:
        if isinstance(label, str) and label.strip() in {str(k) for k in labels}:
            label = next(k for k in labels if str(k) == label.strip())
        else:
            raise BadField(
                "label",
                "missing" if label is None else repr(label)[:40],
                f"one of {', '.join(map(repr, labels))}",
                "no preference",
            )
    chosen, rejected = (a, b) if labels[label] else (b, a)
    return _turns({**row, "chosen": chosen, "rejected": rejected})


def _ranked(row: Row) -> Row:
    texts, values, row = ranked_texts(row)
    best, worst = max(values), min(values)
    chosen, rejected = texts[values.index(best)], texts[values.index(worst)]
    return _turns({**row, "chosen": chosen, "rejected": rejected})


def ranked_texts(row: Row) -> tuple[list[Any], list[float], Row]:
    """(completions, a score of each, the rest of the row); `BadField` where none is the best."""
    name = next((n for n in _LISTS if n in row), None)
    if name is None:
        columns = listed(row) or "no column"
        raise BadField(
            _LISTS[0], f"missing (the row has {columns})", "a list of completions", "missing field"
        )
    items = row.pop(name)
    if not isinstance(items, list) or len(items) < 2:
        got = f"{len(items)} of them" if isinstance(items, list) else kind_of(items)
        raise BadField(name, got, "a list of at least two completions", "mis-typed field")
    if "context" in row and "prompt" not in row:
        row["prompt"] = row.pop("context")
    column = next((n for n in _SCORES if row.get(n) is not None), None)
    if column is not None:
        values, texts = row.pop(column), items
    elif all(isinstance(item, dict) and "rank" in item for item in items):
        column, values = "ranks", [item["rank"] for item in items]
        texts = [item.get("completion", item.get("text")) for item in items]
    elif all(isinstance(item, dict) and "score" in item for item in items):
        column, values = "scores", [item["score"] for item in items]
        texts = [item.get("completion", item.get("text")) for item in items]
    else:
        raise BadField(
            name, "completions without ranks", f"one of {', '.join(_SCORES)}", "no preference"
        )
    if not isinstance(values, list) or len(values) != len(texts):
        got = f"{len(values)} of them" if isinstance(values, list) else kind_of(values)
        raise BadField(column, got, f"{len(texts)}, one a completion", "mis-typed field")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not _finite(value):
            raise BadField(column, repr(value)[:40], "finite numbers", "mis-typed field")
    if min(values) == max(values):
        raise BadField(column, "all equal", "a best and a worst", "no preference")
    return texts, [-value for value in values] if column == "ranks" else values, row


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _turns(row: Row) -> Row:
    """Texts beside a prompt of messages are the assistant's answers."""
    if isinstance(row.get("prompt"), list):
        for name in ("chosen", "rejected"):
            row[name] = _said(row, name)
    return row


def _binary(row: Row) -> Row:
    raise BadField(
        "completion" if "completion" in row else "output",
        "one completion with a label",
        "two to prefer between: unpaired data is of KTO and its like (loss_type kto or "
        "apo_zero_unpaired)",
        "no preference",
    )


_MAKERS = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "output_AB": _output_ab,
    "output_12": _output_12,
    "ranked": _ranked,
    "binary": _binary,
}
