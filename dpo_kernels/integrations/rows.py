"""Columns of a preference dataset with one number a pair: `beta`, `weight`, `margin`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# column -> option of the loss
ROW_OPTIONS = {"beta": "beta", "weight": "weights", "margin": "offset"}


class WithRowColumns:
    """A collator that hands on the row columns which the given one would drop."""

    def __init__(self, collator: Callable[[list], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Taken out first: a collator that pads whatever it is given would trip over them.
        columns = {k: [e[k] for e in examples] for k in ROW_OPTIONS if k in examples[0]}
        plain = [{k: v for k, v in e.items() if k not in columns} for e in examples]
        batch = dict(self.collator(plain, *args, **kwargs))
        for name, values in columns.items():
            batch[name] = torch.tensor([float(v) for v in values], dtype=torch.float32)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # asked for before __init__, when a worker unpickles it
            raise AttributeError(name)
        return getattr(self.collator, name)


def take_row_options(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the batch without row columns, loss options from them)."""
    rest = {k: v for k, v in batch.items() if k not in ROW_OPTIONS}
    return rest, {ROW_OPTIONS[k]: batch[k] for k in ROW_OPTIONS if k in batch}
