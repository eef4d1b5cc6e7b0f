"""`dpo-kernels sweep`."""

from __future__ import annotations

import argparse
from typing import Any

from ..train.config import ALIASES
from ..train.config_files import UserError
from ..train.run_options import GROUPS
from .options_of import add_options, given, printed


def add(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train for several betas, numbers of pairs, SFT weights; table and chart",
        usage="dpo-kernels sweep --betas B ... [CONFIG.yaml] [OPTIONS of train]",
        description="Train at every combination of --betas, --sft_weights and --pair_counts, each "
        "in a folder below --output_dir. Runs that are done are not made again.",
        epilog="example: dpo-kernels sweep --betas 0.05 0.1 0.5 --model_name_or_path ./my-model "
        "--dataset_name pairs.jsonl --output_dir runs/sweep",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    group = sweep.add_argument_group("what is swept")
    group.add_argument("--betas", nargs="+", type=float, metavar="FLOAT")
    group.add_argument("--sft_weights", nargs="+", type=float, metavar="FLOAT")
    group.add_argument("--pair_counts", nargs="+", type=int, metavar="INT")
    add_options(sweep, GROUPS, ALIASES, skip=("resume_from_checkpoint",))
    sweep.set_defaults(run=run, command=sweep, trl=True)


def run(args: argparse.Namespace) -> int:
    from ..iterate.sweeps import Grid, run_sweep, sweep_table
    from ..train.config import load_config
    from ..train.console import Console

    options = given(args)
    axes = {
        name: options.pop(option, None) or []
        for name, option in (
            ("beta", "betas"),
            ("sft_weight", "sft_weights"),
            ("num_pairs", "pair_counts"),
        )
    }
    folder = options.pop("output_dir", None)
    if printed(args, load_config(options)):
        return 0
    if folder is None:
        raise UserError("output_dir is missing: the folder of the sweep")
    console = Console()
    with console.signals():
        rows = run_sweep(Grid(**axes), options, folder, console)
    console.say(sweep_table(rows))
    console.say(f"{folder}/sweep.jsonl, sweep.png")
    return 0
