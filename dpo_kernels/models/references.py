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


def adapters_in_force(model: Any) -> list[str]:
    """The names of the adapters that a PEFT model's forward uses."""
    active = getattr(model, "active_adapters", [])
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)


@contextmanager
def reference_adapter(model: Any, name: str | None = None) -> Iterator[None]:
    """The reference below a PEFT model: the adapter `name`, else that called `ref`, else none.

    `ValueError` where there is no such adapter, or it is the one that is trained.
    """
    own = not hasattr(model, "disable_adapter")  # adapters that transformers itself has loaded
    known = list(model.peft_config)
    if name is not None and name not in known:
        raise ValueError(
            f"ref_adapter_name: the model has no adapter {name!r}, expected one of "
            f"{', '.join(map(repr, known))}"
        )
    name = name or ("ref" if "ref" in known else None)
    if name is not None and name in adapters_in_force(model):
        raise ValueError(
            f"ref_adapter_name: {name!r} is the adapter that is trained, so the reference would "
            "move with the policy; expected another one (set_adapter chooses what is trained)"
        )
    if name is None:
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
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)
