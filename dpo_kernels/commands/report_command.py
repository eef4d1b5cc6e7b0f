"""`dpo-kernels report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..train.config import UserError


def add(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="a page and charts of benchmark results",
        description="Turn a results file, or all of a folder, into one HTML page with its charts.",
    )
    report.add_argument("path", metavar="PATH", help="a results file or a folder of them")
    report.add_argument("--output_dir", metavar="FOLDER", help="default: report/ beside PATH")
    report.set_defaults(run=run, command=report)


def run(args: argparse.Namespace) -> int:
    from ..bench.report import results_in, write_report

    path = Path(args.path)
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a results file or a folder of them")
    try:
        files = results_in(path)
        if not files:
            raise UserError(f"{path} holds no results file of `dpo-kernels bench`")
        folder = (
            Path(args.output_dir)
            if args.output_dir
            else (path if path.is_dir() else path.parent) / "report"
        )
        print(f"wrote {write_report(files, folder)}")
    except ValueError as error:
        raise UserError(str(error)) from None
    return 0
