"""`dpo-kernels verify`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ..train.config import UserError


def add(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="what a DPO trainer gets wrong: a conformance suite on tiny models",
        description="Run trainers on tiny models and hold them to plain torch: accumulation, "
        "unequal batches, truncation, EOS, packing, the reference, its cache, resume, two "
        "processes and FSDP2 on gloo. Prints a table of pass, fail and n/a (not applicable). "
        "Exit code 1 if anything fails.",
    )
    verify.add_argument(
        "targets",
        metavar="TARGET",
        nargs="*",
        default=["loop"],
        help="loop (default), trainer (transformers'), trl, trl-patched, or module:function",
    )
    verify.add_argument(
        "--check", default="", metavar="TEXT", help="checks with this in their name"
    )
    verify.add_argument("--json", metavar="FILE", help="write the results there")
    verify.set_defaults(run=run, command=verify)


def _width(stream: Any) -> int | None:
    """The columns of a terminal; None of what is none, where lines stay whole."""
    return max(shutil.get_terminal_size((80, 24)).columns, 20) if stream.isatty() else None


def _print(text: str, stream: Any) -> None:
    from ..data.show import folded

    width = _width(stream)
    for line in text.splitlines():
        for part in folded(line, width) if width and line else (line,):
            print(part, file=stream, flush=True)


def run(args: argparse.Namespace) -> int:
    from ..verify import CHECKS, NotApplicable, as_json, as_text, named, verify

    checks = [check for check in CHECKS if args.check in check.name]
    if not checks:
        names = ", ".join(check.name for check in CHECKS)
        raise UserError(f"no check has {args.check!r} in its name; the checks are: {names}")
    targets = []
    for name in args.targets:
        try:
            targets.append(named(name))
        except (NotApplicable, ValueError) as error:
            raise UserError(f"{name}: {error}" if name not in str(error) else str(error)) from None
    found = verify(targets, checks, lambda line: _print(line, sys.stderr))
    _print(as_text(found, _width(sys.stdout)), sys.stdout)
    if args.json:
        text = json.dumps(as_json(targets, found), indent=1)
        try:
            Path(args.json).write_text(text + "\n")
        except OSError as error:
            raise UserError(f"--json: {args.json}: {error.strerror}") from None
    failed = any(o.status == "fail" for mine in found.values() for o in mine.values())
    return 1 if failed else 0
