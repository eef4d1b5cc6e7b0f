"""`dpo-kernels score`."""

from __future__ import annotations

import argparse
from typing import Any

from ..train.config import ALIASES
from ..train.run_options import SCORE_GROUPS
from .options_of import PRINT_CONFIG, add_options, given


def add(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="log-probs and implicit rewards of pairs or completions",
        usage="dpo-kernels score [CONFIG.yaml] [OPTIONS]",
        description="Log-probs that a model gives to the completions of a file, beside a "
        "reference's (--ref_model_name_or_path) or alone, and the implicit rewards: beta times the "
        "log-ratio. A row of output for each usable row of input, in its order.",
        epilog="example: dpo-kernels score --model_name_or_path runs/first/model "
        "--ref_model_name_or_path ./my-model --dataset_name pairs.jsonl --output_file "
        "scores.jsonl",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_options(score, SCORE_GROUPS, ALIASES)
    score.set_defaults(run=run, command=score)


def run(args: argparse.Namespace) -> int:
    from ..train.console import Console
    from ..train.score import ScoreConfig, run_score

    config = ScoreConfig(**given(args))
    if hasattr(args, PRINT_CONFIG):
        from ..train.config_files import yaml_text

        print(yaml_text(config, SCORE_GROUPS), end="")
        return 0
    console = Console()
    with console.signals():
        run_score(config, console)
    return 0
