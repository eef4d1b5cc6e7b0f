"""Sets of cases, measured one after the other: what `dpo-kernels bench` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import cases as _cases
from .cases import Case
from .measure import measure
from .peak_memory import weigh
from .providers import providers
from .results import as_row

SETS = ("quick", "full", "scaling", "memory")
ROUNDS = {"quick": 5, "full": 9, "scaling": 5}
# Where memory decides: heads of large vocabulary.
MEMORY_SUITES = ("linear trained", "logits fwd+bwd")


def run_set(
    name: str, select: str = "", provider: str = "", report: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """Rows of a set, as they are measured; `select` and `provider` are parts of names."""
    if name not in SETS:
        raise ValueError(f"the set must be one of {SETS}, got {name!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "memory":
        yield from _memory(device, select, provider, report)
        return
    if name == "scaling":
        for series, chosen in _cases.scaling(device).items():
            for case in chosen:
                if select in f"{series}: {case.name}":
                    report(f"{series}: {case.name}")
                    for m in measure(case, device, ROUNDS[name], provider):
                        if not m.note:
                            yield as_row(m) | {"series": series, "x": grown(series, case)}
        return
    for case in _cases.quick(device) if name == "quick" else _cases.full(device):
        if select in case.name:
            report(case.name)
            for m in measure(case, device, ROUNDS[name], provider):
                yield as_row(m)


def _memory(device: str, select: str, provider: str, report: Callable[[str], None]):
    chosen = [("", case) for case in memory_cases(device)]
    for series, cases in _cases.scaling(device).items():
        if _cases.grown_in(series) in ("tokens", "vocabulary"):
            chosen += [(series, case) for case in cases]
    for series, case in chosen:
        name = f"{series}: {case.name}" if series else case.name
        if select not in name:
            continue
        report(name)
        for found, _ in providers(case, device):
            if provider not in found:
                continue
            m = weigh(case, found, device)
            if not series:
                yield as_row(m)
            elif not m.note:
                yield as_row(m) | {"series": series, "x": grown(series, case)}


def memory_cases(device: str) -> list[Case]:
    if device == "cuda":
        return [Case(s, "Llama-3-8B", "bf16", 8192, 0.6, pairs=4) for s in MEMORY_SUITES]
    return [Case(s, "SmolLM2-135M", "fp32", 512, 0.6) for s in MEMORY_SUITES]


def grown(series: str, case: Case) -> float:
    """The size of what grows along a series, of one of its cases."""
    sizes = {
        "tokens": case.tokens,
        "scored fraction": case.fraction,
        "pairs": case.pairs,
        "vocabulary": case.shape.vocabulary,
        "hidden size": case.shape.hidden,
    }
    return sizes[_cases.grown_in(series)]
