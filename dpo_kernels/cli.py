"""The command line: `dpo-kernels train | run | data check | bench | report | doctor`.

Options carry TRL's names and may be written with underscores or dashes. A mistake of the user's
ends with one line and exit code 2; training that breaks off (a loss that is not finite) with 1;
a signal with 130 or 143. What was trained by then is saved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_type_hints

from .commands import COMMANDS, doctor_command, train_command
from .requirements import torch_problem
from .train import trl_options
from .train.config import DPOTrainConfig, UserError, nearest
from .train.console import silence
from .version import __version__

USER_ERROR = 2
READER_GONE = 141  # what a shell shows for a program whose output nobody reads any more


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except SystemExit:  # of --help and --version
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            raise
    except UserError as error:
        print(f"dpo-kernels: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as error:
        print("dpo-kernels: interrupted", file=sys.stderr)
        return getattr(error, "code", 130)
    except BrokenPipeError:  # whoever read the output has left
        pass
    silence(sys.stdout)
    return READER_GONE


def _run(argv: Sequence[str]) -> int:
    parser = _parser()
    argv, behind = _split(argv)
    args, rest = parser.parse_known_args(_underscored(argv))
    if hasattr(args, "behind"):
        args.behind = behind
    elif behind:
        raise UserError(f"unrecognized arguments: -- {' '.join(behind)}")
    if not hasattr(args, "run"):
        if rest:
            raise UserError(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help(sys.stderr)
        return USER_ERROR
    command = vars(args).pop("command", parser)
    for name, value in _others(rest, command, args.run is train_command.run).items():
        setattr(args, name, value)
    if args.run is doctor_command.run:  # works without torch: that is when it is needed most
        return doctor_command.run(args)
    if problem := torch_problem():
        raise UserError(str(problem))
    from .data import DataError
    from .train.optim import TrainingError

    try:
        return args.run(args)
    except DataError as error:
        raise UserError(str(error)) from None
    except TrainingError as error:
        print(f"dpo-kernels: training stopped: {error}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def _others(rest: list[str], command: argparse.ArgumentParser, train: bool) -> dict[str, Any]:
    """Options of TRL's among the arguments that argparse does not know; the rest is a mistake."""
    found: dict[str, Any] = {}
    values: list[str] | None = None
    for arg in rest:
        name, equals, value = arg[2:].partition("=")
        if not arg.startswith("--"):
            if values is None:
                raise UserError(f"unrecognized arguments: {arg}")
            values.append(arg)
        elif train and name in trl_options.NAMES:
            found[name] = values = [value] if equals else []
        elif train and name.startswith("no_") and _switch(name[3:]) and not equals:
            found[name[3:]], values = ["false"], None
        else:
            known = [o[2:] for o in command._option_string_actions if o.startswith("--")]
            raise UserError(f"unknown option --{name}{nearest(name, known, '--')}")
    return {name: _literal(values) for name, values in found.items()}


def _switch(name: str) -> bool:
    """Whether `--no_<name>` turns it off, as transformers' parser has it."""
    return name in trl_options.NAMES or get_type_hints(DPOTrainConfig).get(name) is bool


def _literal(texts: list[str]) -> Any:
    """The value of an option whose type argparse is not told: JSON where it reads as such."""
    values: list[Any] = []
    for text in texts:
        try:
            values.append(json.loads(text.lower() if text in ("True", "False") else text))
        except ValueError:
            values.append(None if text in ("None", "none", "null") else text)
    return True if not values else values[0] if len(values) == 1 else values


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and another program's, which stand behind a bare `--`."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def _underscored(argv: Sequence[str]) -> list[str]:
    """`--max-length=5` and `--max_length=5` are one option."""
    result = []
    for arg in argv:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            arg = "--" + name.replace("-", "_") + equals + value
        result.append(arg)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dpo-kernels",
        description="Train language models on preference pairs with fused DPO kernels.",
    )
    parser.add_argument("--version", action="version", version=f"dpo-kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
