"""Iterative DPO: sample, judge, pair, train, promote; each part alone or as a loop that resumes.

    generate -> judge -> pairs -> train.run_job -> win rate and guards -> the next round

Every part reads and writes files that any trainer can read. Nothing here imports transformers,
openai or matplotlib until it is called.
"""

from .judges import EnsembleJudge, Judge, PairwiseJudge, ScoreJudge, make_judge, rule_judge
from .pair_rules import make_pairs
from .records import PairItem, Prompt, Sample, Verdict
from .rounds import IterateConfig, run_iteration
from .sampling import generate
from .verdicts import judge_samples

__all__ = [
    "EnsembleJudge",
    "IterateConfig",
    "Judge",
    "PairItem",
    "PairwiseJudge",
    "Prompt",
    "Sample",
    "ScoreJudge",
    "Verdict",
    "generate",
    "judge_samples",
    "make_judge",
    "make_pairs",
    "rule_judge",
    "run_iteration",
]
