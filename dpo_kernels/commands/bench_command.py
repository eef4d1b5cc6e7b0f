"""`dpo-kernels bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..train.config import UserError


def add(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="throughput and memory beside the peers that are installed",
        description="Measure a set of cases: every provider is checked against float64, then timed "
        "in turns with the others. Prints tables; --json keeps the results for `report`.",
    )
    bench.add_argument(
        "--set",
        choices=("quick", "full", "scaling", "memory"),
        default="quick",
        help="default: %(default)s",
    )
    bench.add_argument("--case", default="", metavar="TEXT", help="cases with this in their name")
    bench.add_argument(
        "--provider", default="", metavar="TEXT", help="providers with this in their name"
    )
    bench.add_argument("--json", metavar="FILE", help="write the results file")
    bench.add_argument("--commit", help="of the sources, where this is no git checkout")
    bench.set_defaults(run=run, command=bench)


def run(args: argparse.Namespace) -> int:
    from ..bench import results
    from ..bench.cases import SUITES
    from ..bench.run import run_set

    meta = results.describe(args.commit)
    rows: list[dict[str, Any]] = []
    begun: list[str] = []

    def report(line: str) -> None:
        begun.append(line)
        print(f"  measuring {line}", file=sys.stderr, flush=True)

    for row in run_set(args.set, args.case, args.provider, report=report):
        rows.append(row)
        if args.json:  # after every row: an interrupted run keeps what it has
            results.write(Path(args.json), meta, rows)
    if not begun:
        raise UserError(
            f"set {args.set}: no case has {args.case!r} in its name; names begin with "
            f"one of: {', '.join(SUITES)}"
        )
    if not rows:
        raise UserError(f"no provider of these cases has {args.provider!r} in its name")
    print(results.text(meta, rows))
    wrong = [row for row in rows if row["ours"] and row["note"].startswith("wrong")]
    return 1 if wrong else 0
