"""`dpo-kernels report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..train.config_files import UserError


def add(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="a page of runs, of an iteration or of benchmark results",
        description="One HTML page that stands alone: of a training run, of several side by side "
        "(or of a folder of them), of an iteration, or of benchmark results. What is made is "
        "decided by what the paths hold.",
    )
    report.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="folders of runs; or a results file of `bench`, or a folder of such",
    )
    report.add_argument(
        "--out",
        metavar="FILE",
        help="the page (default: report.html in the run's folder; of several runs in the folder "
        "that they share; of results in report/ beside them)",
    )
    report.add_argument(
        "--output_dir", metavar="FOLDER", help="the same as --out FOLDER/report.html"
    )
    report.set_defaults(run=run, command=report)


def run(args: argparse.Namespace) -> int:
    from ..report import NoRun, runs_in, write_page

    if args.out and args.output_dir:
        raise UserError("--out and --output_dir: give one of them")
    paths = [Path(p) for p in args.paths]
    for path in paths:
        if not path.exists():
            raise UserError(
                f"{path} does not exist; expected the folder of a run, a results file or a folder "
                "of them"
            )
    out = Path(args.out) if args.out else None
    if args.output_dir:
        out = Path(args.output_dir) / "report.html"
    if out is not None and out.is_dir():
        raise UserError(f"--out: {out} is a folder; expected the page's file, or --output_dir")
    try:
        results = _results(paths)
        if results:
            from ..bench.report import write_report

            beside = paths[0] if paths[0].is_dir() else paths[0].parent
            try:
                page = write_report(results, out or beside / "report" / "report.html")
            except ValueError as error:
                raise UserError(f"{error} (a run is named by its folder)") from None
        else:
            try:
                for path in paths:
                    runs_in(path)
            except NoRun as error:
                raise UserError(
                    f"{error}; it holds no results file of `dpo-kernels bench`"
                ) from None
            page = write_page(paths, out)
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"the page cannot be written: {error}") from None
    print(f"wrote {page}")
    return 0


def _results(paths: list[Path]) -> list[Path]:
    """The results files that all these paths name; none where they are runs."""
    from ..bench.report import results_in
    from ..report import NoRun, runs_in

    found: list[Path] = []
    runs: list[Path] = []
    for path in paths:
        if path.is_file():
            files = results_in(path)
        else:
            try:
                runs_in(path)
                files = []
            except NoRun:
                files = results_in(path)
        if files:
            found += files
        else:
            runs.append(path)
    if found and runs:
        raise UserError(f"{found[0]} holds benchmark results and {runs[0]} does not: one page each")
    return found
