"""A conformance suite: runs any DPO trainer on tiny models and says what it gets wrong."""

from .contract import Case, NotApplicable, Target, Trained
from .mistakes import CHECKS, Check, Outcome
from .results_table import as_json, as_text, verify
from .targets import named

__all__ = [
    "CHECKS",
    "Case",
    "Check",
    "NotApplicable",
    "Outcome",
    "Target",
    "Trained",
    "as_json",
    "as_text",
    "named",
    "verify",
]
