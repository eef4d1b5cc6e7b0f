"""`dpo-kernels train`."""

from __future__ import annotations

import argparse
from typing import Any

from ..train.config import ALIASES
from ..train.run_options import GROUPS
from .options_of import add_options, run_job_of


def add(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model on preference pairs",
        usage="dpo-kernels train [CONFIG.yaml] [OPTIONS]",
        description="Train a causal LM on preference pairs. Without a model and data it trains the "
        "small model and data set that ship with the package.",
        epilog="example: dpo-kernels train --model_name_or_path ./my-model --dataset_name "
        "pairs.jsonl --beta 0.1 --learning_rate 1e-6 --output_dir runs/first",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_options(train, GROUPS, ALIASES)
    train.add_argument(
        "--dry_run",
        action="store_true",
        help="report batches, tokens, memory and time of the run, and what would be refused; "
        "train nothing, write nothing",
    )
    train.set_defaults(run=run, command=train, trl=True)


def run(args: argparse.Namespace) -> int:
    from ..train.dry_run import dry_run
    from ..train.job import resolve, run_job

    return run_job_of(args, lambda options: resolve(options)[0], GROUPS, run_job, dry_run)
