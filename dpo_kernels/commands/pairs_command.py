"""`dpo-kernels pairs`."""

from __future__ import annotations

import argparse
from typing import Any

from .options_of import add_options, given, printed


def add(commands: Any) -> None:
    from ..iterate.command_options import PairsConfig

    pairs = commands.add_parser(
        "pairs",
        help="make preference pairs of samples and verdicts",
        usage="dpo-kernels pairs [CONFIG.yaml] [OPTIONS]",
        description="Write rows prompt, chosen, rejected, margin, p_chosen: any trainer of "
        "preference pairs reads them (--format gives completions with a label, or ranked lists). "
        "Exit code 1 if there is none.",
        epilog="example: dpo-kernels pairs --samples samples.jsonl --verdicts verdicts.jsonl "
        "--output pairs.jsonl --select all --length_matched 0.2",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_options(pairs, (PairsConfig,), {})
    pairs.set_defaults(run=run, command=pairs, trl=True)


def run(args: argparse.Namespace) -> int:
    from ..iterate.command_options import PairsConfig
    from ..iterate.judged_rows import make_rows
    from ..iterate.records import read_samples, read_verdicts, write_table
    from ..iterate.settings import load_options
    from ..train.start import refuse_many_processes

    refuse_many_processes("pairs")
    config = load_options(PairsConfig, given(args))
    if printed(args, config):
        return 0
    samples, verdicts = read_samples(config.samples), read_verdicts(config.verdicts)
    rows, counts = make_rows(config.format, samples, verdicts, config, config.seed)
    write_table(config.output, rows)
    print(f"{counts.describe()}; in {config.output}")
    return 0 if rows else 1
