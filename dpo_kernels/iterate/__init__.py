"""Iterative DPO: sample, judge, pair, train, promote; each part alone or as a loop that resumes.

    generate -> judge_samples -> make_pairs -> train.run_job -> win rate and guards -> again

Every part reads and writes files that any trainer can read. Nothing is imported before it is
asked for.
"""

from importlib import import_module
from typing import Any

_FROM = {
    "judges": (
        "EnsembleJudge",
        "Judge",
        "PairwiseJudge",
        "ScoreJudge",
        "make_judge",
        "rule_judge",
    ),
    "judge_eval": ("evaluate_judge", "read_labelled"),
    "pair_rules": ("make_pairs",),
    "records": ("PairItem", "Prompt", "Sample", "Verdict"),
    "command_options": ("IterateConfig",),
    "rounds": ("run_iteration",),
    "sampling": ("generate",),
    "verdicts": ("judge_samples",),
}
_HOME = {name: module for module, names in _FROM.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
