"""`dpo-kernels run -- COMMAND ...`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from ..integrations import at_start
from ..train.config import UserError

NOT_STARTED, NOT_FOUND = 126, 127  # as a shell has them


def add(commands: Any) -> None:
    run_parser = commands.add_parser(
        "run",
        help="another program's DPO training with the fused head, its files as they are",
        usage="%(prog)s [options] -- COMMAND [ARGUMENT ...]",
        description="Run a training command (llamafactory-cli, swift, axolotl, trl, accelerate, "
        "torchrun, python ...) whose DPO trainer is patched when it is imported, in its process "
        "and in those that it starts. At the end it is said if no training step was fused.",
    )
    run_parser.add_argument(
        "--share_prefix",
        action="store_true",
        help="run the trunk once over the prompt that chosen and rejected share",
    )
    run_parser.add_argument(
        "--no_head_stats",
        action="store_true",
        help="leave entropy, mean logits and token accuracy out of the metrics",
    )
    run_parser.add_argument(
        "--no_check_reference",
        action="store_true",
        help="do not look whether policy and reference are equal before the first step",
    )
    run_parser.add_argument(
        "--no_check_first_step",
        action="store_true",
        help="do not look at rows, gradients and weights around the first step",
    )
    run_parser.add_argument(
        "--on_bypass",
        choices=("raise", "warn"),
        default="raise",
        help="what to do with a trainer whose first step is not fused; default: %(default)s",
    )
    run_parser.add_argument("--memory_budget", type=int, metavar="BYTES", help="for logits")
    run_parser.add_argument("--backend", help="cuda, triton, cpu or torch; default: by device")
    run_parser.set_defaults(run=run, command=run_parser, behind=())


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `patch_trl` and its kin that these arguments are."""
    return {
        "share_prefix": args.share_prefix,
        "head_stats": not args.no_head_stats,
        "check_reference": not args.no_check_reference,
        "check_first_step": not args.no_check_first_step,
        "memory_budget": args.memory_budget,
        "backend": args.backend,
        "on_bypass": args.on_bypass,
    }


def environment(given: dict[str, Any], report: str) -> dict[str, str]:
    """The environment in which a Python patches what it imports."""
    path = [str(at_start.FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        at_start.OPTIONS: json.dumps(given),
        at_start.REPORT: report,
    }


def run(args: argparse.Namespace) -> int:
    command = list(args.behind)
    if not command:
        raise UserError(
            "run needs a command behind --: dpo-kernels run -- llamafactory-cli train x.yaml"
        )
    program = shutil.which(command[0])
    if program is None:
        print(f"dpo-kernels: error: no program {command[0]!r} on PATH", file=sys.stderr)
        return NOT_FOUND
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        env = environment(options(args), str(report))
        try:
            child = subprocess.Popen([program, *command[1:]], env=env)
        except OSError as error:  # a script without its #! line
            print(f"dpo-kernels: error: {program} does not start: {error}", file=sys.stderr)
            return NOT_STARTED
        code = _wait(child)
        lines = report.read_text().splitlines() if report.exists() else []
    _tell(lines)
    return code


def _tell(lines: list[str]) -> None:
    """What was fused, which the command's own logging may have swallowed, or that nothing was."""
    fused = dict.fromkeys(x.removeprefix("fused ") for x in lines if x.startswith("fused "))
    patched = dict.fromkeys(x.removeprefix("patched ") for x in lines if x.startswith("patched "))
    if fused:
        told = list(fused)
    elif patched:
        told = [f"nothing was fused: {', '.join(patched)} was patched, but made no fused step"]
    else:
        told = [
            "nothing was fused: the command imported no DPO trainer that is known here (trl, "
            "llamafactory, ms-swift)"
        ]
    for line in told:
        print(f"dpo-kernels run: {line}", file=sys.stderr)


def _wait(child: subprocess.Popen) -> int:
    """The child's exit code; what this process is told by a signal goes on to the child."""

    def forward(number: int, _: FrameType | None) -> None:
        if number not in _FROM_A_TERMINAL or not _in_foreground():
            child.send_signal(number)

    heard = [n for n in _HANDED_ON if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


# What ends a program, and what job managers announce its end by.
_HANDED_ON = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
_FROM_A_TERMINAL = {getattr(signal, name, None) for name in ("SIGINT", "SIGQUIT")}


def _in_foreground() -> bool:
    """Whether a terminal's interrupt reaches this process, and with it the child, by itself."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except (OSError, AttributeError):
        return False
