"""Columns of a preference dataset with one number a pair: `beta`, `weight`, `margin`,
`label_smoothing`. A `group`, which takes weights of its own, is named and not used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.row import number_wanted

# column -> option of the loss
ROW_OPTIONS = {
    "beta": "beta",
    "weight": "weights",
    "margin": "offset",
    "label_smoothing": "label_smoothing",
}
_GROUP = (
    "the column 'group' is not used here: offsets and temperatures of groups are learned by "
    "`dpo-kernels train --learn_groups` alone"
)


def number_of(column: str, value: Any, where: str) -> float:
    """The value of a row column; `ValueError` that names the row where it is none."""
    try:
        number = None if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    wanted = number_wanted(column, number)
    if wanted:
        wanted = "a finite number" if number is None else wanted
        raise ValueError(f"column {column!r} of {where} must be {wanted}, got {value!r}")
    assert number is not None
    return number


def row_numbers(examples: Sequence[Mapping[str, Any]], column: str) -> Tensor:
    """[B] the column's numbers; an example is named by its place and its prompt."""
    numbers = []
    for i, example in enumerate(examples):
        prompt = example.get("prompt", example.get("prompt_ids"))
        where = f"example {i} of the batch (prompt {str(prompt)[:60]})"
        numbers.append(number_of(column, example.get(column), where))
    return torch.tensor(numbers, dtype=torch.float32)


def row_columns(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The row columns of a batch, each [B]: of those that one of its examples has."""
    if any(example.get("group") is not None for example in examples):
        warnings.warn(_GROUP, stacklevel=3)
    return {k: row_numbers(examples, k) for k in ROW_OPTIONS if any(k in e for e in examples)}


def check_row_columns(given: Mapping[str, Any]) -> None:
    """The row columns of a trainer's data sets, before training, where they have columns to read.

    `given`: the trainer's arguments by name.
    """
    for name in ("train_dataset", "eval_dataset"):
        sets = given.get(name)
        for key, dataset in (sets if isinstance(sets, dict) else {name: sets}).items():
            columns = getattr(dataset, "column_names", None)
            if isinstance(columns, list) and "group" in columns:
                warnings.warn(_GROUP, stacklevel=3)
            if dataset is None or not isinstance(columns, list) or not hasattr(dataset, "__len__"):
                continue
            for column in ROW_OPTIONS:
                values: Iterable[Any] = dataset[column] if column in columns else ()
                for i, value in enumerate(values):
                    number_of(column, value, f"{key} row {i}")


class WithRowColumns:
    """A collator that hands on the row columns which the given one would drop."""

    def __init__(self, collator: Callable[[list], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Taken out first: a collator that pads whatever it is given would trip over them.
        columns = row_columns(examples)
        plain = [{k: v for k, v in e.items() if k not in columns} for e in examples]
        batch = dict(self.collator(plain, *args, **kwargs))
        return batch | columns

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # asked for before __init__, when a worker unpickles it
            raise AttributeError(name)
        return getattr(self.collator, name)


def take_row_options(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the batch without row columns, loss options from them)."""
    rest = {k: v for k, v in batch.items() if k not in ROW_OPTIONS}
    return rest, {ROW_OPTIONS[k]: batch[k] for k in ROW_OPTIONS if k in batch}
