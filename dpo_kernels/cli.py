"""The command line: `dpo-kernels train | data check | bench | report | doctor`.

Options carry TRL's names and may be written with underscores or dashes. A mistake of the user's
ends with one line and exit code 2; training that breaks off (a loss that is not finite) with 1;
a signal with 130 or 143. What was trained by then is saved.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from .requirements import torch_problem
from .train import trl_options
from .train.config import ALIASES, DPOTrainConfig, UserError, load_config, nearest, read_config_file
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
    args, rest = parser.parse_known_args(_underscored(argv))
    if not hasattr(args, "run"):
        if rest:
            raise UserError(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help(sys.stderr)
        return USER_ERROR
    command = vars(args).pop("command", parser)
    for name, value in _others(rest, command, args.run is _train).items():
        setattr(args, name, value)
    if args.run is _doctor:  # works without torch: that is when it is needed most
        return _doctor(args)
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

    train = commands.add_parser(
        "train",
        help="train a model on preference pairs",
        usage="dpo-kernels train [OPTIONS]",
        description="Train a causal LM on preference pairs. Without a model and data it trains the "
        "small model and data set that ship with the package.",
        epilog="example: dpo-kernels train --model_name_or_path ./my-model --dataset_name "
        "pairs.jsonl --beta 0.1 --learning_rate 1e-6 --output_dir runs/first",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    train.add_argument(
        "--config",
        metavar="FILE",
        help="JSON or YAML file of these options; the command line overrides it",
    )
    _add_options(train)
    train.set_defaults(run=_train, command=train)

    data = commands.add_parser("data", help="look at preference data")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="report the bad rows of a file",
        description="Read a file of preference pairs (JSONL, a JSON list or CSV, also packed; - is "
        "standard input); report the rows that training would leave out, and a summary. Exit code "
        "1 if there is any.",
    )
    check.add_argument("file", metavar="FILE")
    check.add_argument(
        "--model_name_or_path",
        metavar="MODEL",
        help="tokenise as well, with this "
        "model's tokenizer: finds pairs that max_length makes useless",
    )
    check.add_argument("--gguf_file", metavar="FILE", help="GGUF file with the tokenizer")
    check.add_argument("--chat_template", metavar="FILE", help="Jinja chat template")
    check.add_argument(
        "--max_length",
        default=1024,
        help="default: %(default)s",
        **_argument(get_type_hints(DPOTrainConfig)["max_length"], None),
    )
    check.add_argument(
        "--left_out",
        metavar="FILE",
        help="write every row that is left out there, as JSONL (of each kind 20 are printed)",
    )
    check.set_defaults(run=_data_check, command=check)

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
    bench.set_defaults(run=_bench, command=bench)

    report = commands.add_parser(
        "report",
        help="a page and charts of benchmark results",
        description="Turn a results file, or all of a folder, into one HTML page with its charts.",
    )
    report.add_argument("path", metavar="PATH", help="a results file or a folder of them")
    report.add_argument("--output_dir", metavar="FOLDER", help="default: report/ beside PATH")
    report.set_defaults(run=_report, command=report)

    doctor = commands.add_parser(
        "doctor",
        help="what is installed, which backends run here, and a self-test",
        description="Versions, devices, backends (and why one is absent), the binary's GPU "
        "architectures, the OpenMP pool, what is wrong and what to do, and a self-test of the "
        "default backend against float64. Exit code 0 only if that passes.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor, command=doctor)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `DPOTrainConfig`, in its groups."""
    hints = get_type_hints(DPOTrainConfig)
    aliases = {name: [f"--{alias}"] for alias, name in ALIASES.items()}
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(DPOTrainConfig):
        meta = field.metadata
        group = groups.setdefault(meta["group"], None)
        if group is None:
            group = groups[meta["group"]] = parser.add_argument_group(meta["group"])
        default = (
            field.default
            if field.default is not dataclasses.MISSING
            else (
                field.default_factory()
                if field.default_factory is not dataclasses.MISSING
                else None
            )
        )
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text = meta["help"] + ("" if default is None else f" (default: {shown})")
        group.add_argument(
            f"--{field.name}",
            *aliases.get(field.name, []),
            dest=field.name,
            help=text.replace("%", "%%"),
            **_argument(hints[field.name], meta["choices"]),
        )


def _argument(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """argparse's keywords for a field's type; `None` can be written as none."""
    optional = type(None) in get_args(hint)
    kind = next(k for k in get_args(hint) if k is not type(None)) if optional else hint
    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        return {"nargs": "+", "type": inner, "metavar": inner.__name__.upper()}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": _boolean, "metavar": "BOOL"}
    if choices:
        return {"choices": choices}

    def convert(text: str) -> Any:
        return None if optional and text.lower() in ("none", "null") else kind(text)

    convert.__name__ = kind.__name__
    return {"type": convert, "metavar": "TEXT" if kind is str else kind.__name__.upper()}


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def _train(args: argparse.Namespace) -> int:
    from .train.console import Console
    from .train.job import run_job

    given = {k: v for k, v in vars(args).items() if k not in ("run", "config")}
    from_file = read_config_file(args.config) if hasattr(args, "config") else {}
    from_file = {ALIASES.get(key, key): value for key, value in from_file.items()}
    console = Console()
    with console.signals():
        run_job({**from_file, **given}, console)
    return 0


def _data_check(args: argparse.Namespace) -> int:
    from .data import LeftOut, NoUsableRow, read_pairs, tokenize_pairs
    from .train.console import Console
    from .train.model import load_tokenizer
    from .train.start import find_model, model_limits

    load_config({"max_length": args.max_length})
    console = Console()
    say = console.say
    left_out = LeftOut(report=say)
    tokenizer = limits = None
    if args.model_name_or_path:
        name = find_model(args.model_name_or_path)
        tokenizer = load_tokenizer(name, args.gguf_file, args.chat_template)
        limits = model_limits(name, args.gguf_file, say)
    usable = chats = read = 0
    with contextlib.suppress(NoUsableRow):
        pairs = read_pairs(args.file, left_out)
        usable, read, chats = len(pairs), len(pairs), sum(p.conversational for p in pairs)
        if tokenizer is not None:
            tokens = tokenize_pairs(
                pairs, tokenizer, args.max_length, left_out, say, limits, console.progress
            )
            usable = len(tokens)
            lengths = sorted(len(s.ids) for p in tokens for s in p.sequences)
            if lengths:
                say(
                    f"tokens of a sequence: median {lengths[len(lengths) // 2]}, "
                    f"longest {lengths[-1]}"
                )
    say(f"{usable} usable pairs ({chats} of {read} read are conversational)")
    for remark in left_out.remarks():
        say(remark)
    say(left_out.summary())
    if len(left_out.problems) > len(left_out.shown()) and not args.left_out:
        say("--left_out FILE writes each of them")
    if args.left_out:
        try:
            left_out.write(Path(args.left_out))
        except OSError as error:
            raise UserError(f"--left_out: {args.left_out}: {error.strerror}") from None
    return 1 if left_out.problems or not usable else 0


def _bench(args: argparse.Namespace) -> int:
    from .bench import results
    from .bench.cases import SUITES
    from .bench.run import run_set

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


def _report(args: argparse.Namespace) -> int:
    from .bench.report import results_in, write_report

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


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine, render

    report = examine()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0 if report["self_test"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
