"""`dpo-kernels sft`."""

from __future__ import annotations

import argparse
from typing import Any

from ..train.config import ALIASES
from ..train.run_options import SFT_DEFAULTS, SFT_GROUPS
from .options_of import add_options, run_job_of


def add(commands: Any) -> None:
    sft = commands.add_parser(
        "sft",
        help="fine-tune a model on conversations",
        usage="dpo-kernels sft [CONFIG.yaml] [OPTIONS]",
        description="Supervised fine-tuning of a causal LM. The data is JSONL with `messages`, "
        "with `prompt` and `completion` (texts or message lists), or with `text`. The assistant's "
        "turns are scored, of a `text` every token.",
        epilog="example: dpo-kernels sft --model_name_or_path ./my-model --dataset_name "
        "chats.jsonl --learning_rate 2e-5 --output_dir runs/sft",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_options(sft, SFT_GROUPS, ALIASES, SFT_DEFAULTS, skip=("compare_plain_torch",))
    sft.add_argument(
        "--dry_run",
        action="store_true",
        help="report steps, tokens, memory and time of the run, and what would be refused; "
        "train nothing, write nothing",
    )
    sft.set_defaults(run=run, command=sft, trl=True)


def run(args: argparse.Namespace) -> int:
    from ..train.sft_dry_run import sft_dry_run
    from ..train.sft_job import resolve_sft, run_sft

    return run_job_of(args, resolve_sft, SFT_GROUPS, run_sft, sft_dry_run)
