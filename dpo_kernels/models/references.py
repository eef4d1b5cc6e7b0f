"""The reference: which losses need one, and where it is below an adapter.

It is a model of its own, or the policy with its adapter off or another one on, always in eval mode
(`structure.deterministic`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dpo_kernels as dk


def needs_reference(loss_options: dict[str, Any]) -> bool:
    """Whether loss or rewards compare with a reference."""
    if loss_options.get("reference_free"):
        return False
    rows = _rows(loss_options)
    return not rows or any(row.takes_reference for row in rows)


def needs_states(loss_options: dict[str, Any]) -> bool:
    """Whether a loss compares whole distributions, for which log-probs are not enough."""
    return any(row.needs_kl for row in _rows(loss_options))


def _rows(loss_options: dict[str, Any]) -> list[dk.losses.Loss]:
    """Rows of the table; none of a loss that is not of pairs, which has a reference."""
    names = loss_options.get("loss_type", "sigmoid")
    return [] if dk.losses.rows_for(names) != "pairs" else dk.losses.rows_of(names)


@contextmanager
def reference_adapter(model: Any) -> Iterator[None]:
    """The reference below a PEFT model: its adapter called `ref` if it has one, else no adapter."""
    own = not hasattr(model, "disable_adapter")  # adapters that transformers itself has loaded
    if "ref" not in model.peft_config:
        if own:
            model.disable_adapters()
            try:
                yield
            finally:
                model.enable_adapters()
            return
        with model.disable_adapter():
            yield
        return
    active = model.active_adapters() if own else model.active_adapter
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter(active)
