"""The command line: `dpo-kernels COMMAND [CONFIG.yaml] [OPTIONS]`.

Options carry TRL's names and may be written with underscores or dashes. A configuration file lies
below them: a first argument that ends in .yaml or .yml (.json as well, where the command takes no
file of data there), or `--config FILE`. A mistake of the user's ends with one line and exit code 2;
training that breaks off (a loss that is not finite) with 1; a signal with 130 or 143. What was
trained by then is saved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .commands import COMMANDS, doctor_command
from .requirements import torch_problem
from .train import trl_options
from .train.config_files import ENDINGS, YAML, UserError, nearest, read_config_file
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
    argv, layer = _with_config(parser, _underscored(argv))
    args, rest = parser.parse_known_args(argv)
    if behind:
        args.behind = behind
    if not hasattr(args, "run"):
        if rest:
            raise UserError(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help(sys.stderr)
        return USER_ERROR
    command, trl = vars(args).pop("command", parser), vars(args).pop("trl", False)
    for name, value in _others(rest, command, trl).items():
        setattr(args, name, value)
    if layer:
        args.layer = layer
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

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's drops the error of a reader that has left while a long text is written."""
        if message:
            (file or sys.stderr).write(message)


# --- the configuration file ---


def _with_config(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[list[str], dict[str, Any]]:
    """The arguments without the configuration file, and what it holds.

    Of commands whose options are TRL's it is a layer of its own; of the others it becomes
    arguments before those that were given.
    """
    command, n = parser, 0
    while n < len(argv) and argv[n] in (found := _commands(command)):
        command, n = found[argv[n]], n + 1
    rest = argv[n:]
    if command is parser:
        return argv, {}
    end = rest.index("--") if "--" in rest else len(rest)
    files = []
    data = any(not a.option_strings for a in command._actions)  # a JSON file may be the data
    if rest and rest[0][:1] != "-" and rest[0].endswith(YAML if data else ENDINGS):
        files.append(rest.pop(0))
        end -= 1
    for i in range(end - 1, -1, -1):
        if rest[i].startswith("--config="):
            files.append(rest.pop(i).partition("=")[2])
        elif rest[i] == "--config":
            if i + 1 == end:
                raise UserError("argument --config: expected one argument")
            files.append(rest[i + 1])
            del rest[i : i + 2]
    if not files:
        return argv, {}
    if len(files) > 1:
        raise UserError(f"one configuration file can be read, got {' and '.join(files)}")
    content = read_config_file(files[0])
    if command.get_default("trl"):
        return [*argv[:n], *rest], content
    return [*argv[:n], *_arguments(content, command, files[0]), *rest], {}


def _commands(parser: argparse.ArgumentParser) -> dict[str, Any]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _arguments(content: dict[str, Any], command: argparse.ArgumentParser, path: str) -> list[str]:
    """What a configuration file says, as arguments of a command."""
    options = {name[2:]: a for name, a in command._option_string_actions.items()}
    # What has a place and no name on the command line (`report PATH...`) has its name here.
    placed = {a.dest for a in command._actions if not a.option_strings}
    texts: list[str] = []
    first: list[str] = []
    for name, value in content.items():
        if name in placed:
            first += map(_text, value if isinstance(value, list) else [value])
            continue
        if name not in options or name in ("help", "config"):
            known = [o for o in (*options, *placed) if o not in ("help", "config", "h")]
            raise UserError(f"{path}: unknown option {name!r}{nearest(name, known)}")
        if options[name].nargs == 0:  # a bare switch
            if not isinstance(value, bool):
                raise UserError(f"{path}: {name} must be true or false, got {value!r}")
            texts += [f"--{name}"] if value else []
        elif isinstance(value, list):
            texts += [f"--{name}", *map(_text, value)]
        elif value is not None:
            texts.append(f"--{name}={_text(value)}")
    return [*first, *texts]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- what argparse does not know ---


def _others(rest: list[str], command: argparse.ArgumentParser, trl: bool) -> dict[str, Any]:
    """Options of TRL's among the arguments that argparse does not know; the rest is a mistake."""
    found: dict[str, Any] = {}
    values: list[str] | None = None
    names = trl_options.NAMES if trl else ()
    for arg in rest:
        name, equals, value = arg[2:].partition("=")
        if not arg.startswith("--"):
            if values is None:
                raise UserError(f"unrecognized arguments: {arg}")
            values.append(arg)
        elif name in names:
            found[name] = values = [value] if equals else []
        elif name.startswith("no_") and name[3:] in names and not equals:
            found[name[3:]], values = ["false"], None
        else:
            known = [o[2:] for o in command._option_string_actions if o.startswith("--")]
            known = [o for o in known if not o.startswith("no_")] + list(
                trl_options.TRANSLATED if trl else ()
            )
            raise UserError(f"unknown option --{name}{nearest(name, known, '--')}")
    return {name: _literal(values) for name, values in found.items()}


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
    """Our arguments, and behind the bare `--` of `run` another program's."""
    at = list(argv).index("--") if list(argv[:1]) == ["run"] and "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def _underscored(argv: Sequence[str]) -> list[str]:
    """`--max-length=5` and `--max_length=5` are one option; behind a bare `--` nothing is ours."""
    result: list[str] = []
    for i, arg in enumerate(argv):
        if arg == "--":
            return [*result, *argv[i:]]
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            arg = "--" + name.replace("-", "_") + equals + value
        result.append(arg)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dpo-kernels",
        description="Train language models on preference pairs with fused DPO kernels.",
        epilog="Every command takes a CONFIG.yaml first, with values for its options.",
    )
    parser.add_argument("--version", action="version", version=f"dpo-kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    for command in COMMANDS:
        command.add(commands)
    for leaf in _leaves(parser):
        # For --help alone: `_with_config` takes it out of the arguments.
        leaf.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML or JSON file of these options; the command line overrides it "
            "(a first argument CONFIG.yaml is the same)",
        )
    return parser


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = _commands(parser).values()
    return [leaf for child in below for leaf in _leaves(child)] if below else [parser]


if __name__ == "__main__":
    sys.exit(main())
