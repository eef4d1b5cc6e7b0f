"""`dpo-kernels doctor`."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, which backends run here, and a self-test",
        description="Versions, devices, backends (and why one is absent), the binary's GPU "
        "architectures, the OpenMP pool, what is wrong and what to do, and a self-test of the "
        "default backend against float64. Exit code 0 only if that passes.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=run, command=doctor)


def run(args: argparse.Namespace) -> int:
    from ..doctor import examine, render

    report = examine()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0 if report["self_test"]["passed"] else 1
