"""`dpo-kernels data check`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any, get_type_hints

from ..train.config import UserError, load_config
from ..train.run_options import DataOptions
from .options_of import argument

_OPTIONS = (
    "max_length",
    "truncation_mode",
    "max_prompt_length",
    "max_completion_length",
    "assistant_only",
    "column_mapping",
)

SILENCE = 5.0  # seconds, after which a long file is told of


def add(commands: Any) -> None:
    data = commands.add_parser("data", help="look at preference data")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="show what of a file would be trained",
        description="Read preference data (JSONL, a JSON list, CSV, Parquet, Arrow; packed or not; "
        "a folder; - is standard input); report the rows that training would leave out, what it "
        "would cut, and what is there twice. Exit code 1 if something would be trained wrongly.",
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
    hints = get_type_hints(DataOptions)
    for field in dataclasses.fields(DataOptions):
        if field.name in _OPTIONS:
            check.add_argument(
                f"--{field.name}",
                default=field.default,
                help=f"{field.metadata['help']} (default: %(default)s)",
                **argument(hints[field.name], field.metadata.get("choices")),
            )
    check.add_argument(
        "--eval_file", metavar="FILE", help="evaluation pairs: finds rows that are in both"
    )
    check.add_argument(
        "--rows",
        choices=("auto", "pairs", "unpaired", "ranked"),
        default="auto",
        help="unpaired: completions with a label (kto, apo_zero_unpaired); ranked: lists "
        "(plackett_luce); auto: unpaired if the first row is, else pairs, for which the best and "
        "the worst of a list count (default: %(default)s)",
    )
    check.add_argument(
        "--show",
        metavar="N",
        type=int,
        default=0,
        help="print the first N pairs token by token: prompt, scored, cut (needs a model)",
    )
    check.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="default: %(default)s"
    )
    check.add_argument(
        "--near",
        choices=("true", "false"),
        default="true",
        help="look for nearly equal rows as well: most of the time where nothing is tokenised "
        "(default: %(default)s)",
    )
    check.add_argument("--json", action="store_true", help="print one JSON object instead")
    check.add_argument(
        "--left_out",
        metavar="FILE",
        help="write every row that is left out there, as JSONL (of each kind 20 are printed)",
    )
    check.set_defaults(run=run, command=check)


def run(args: argparse.Namespace) -> int:
    from ..train.console import Console

    load_config({name: getattr(args, name) for name in _OPTIONS})
    if args.show < 0:
        raise UserError(f"--show must be a number of pairs of at least 0, got {args.show}")
    if args.show and not args.model_name_or_path:
        raise UserError("--show prints tokens: give the model too (--model_name_or_path MODEL)")
    console = Console(quiet=args.json)
    with contextlib.ExitStack() as stack:
        sink = None
        if args.left_out:
            try:
                file = stack.enter_context(
                    open(args.left_out, "w", encoding="utf-8", errors="backslashreplace")
                )
            except OSError as error:
                raise UserError(f"--left_out: {args.left_out}: {error.strerror}") from None
            sink = file
        return _Check(args, console, sink).run()


class _Check:
    """One pass over a file."""

    def __init__(self, args: argparse.Namespace, console: Any, sink: Any) -> None:
        from ..data import LeftOut
        from ..data.left_out import SHOWN
        from ..data.survey import Lengths, Marks

        self.args, self.console = args, console
        self.width = max(min(shutil.get_terminal_size((80, 24)).columns, 160), 20)
        # Of what is no terminal the lines stay whole: someone looks for words in them.
        self.folds = sys.stdout.isatty() and not args.json
        write = None if sink is None else lambda problem: sink.write(problem.as_json())
        self.left_out = LeftOut(report=self.say, keep=SHOWN, sink=write)
        self.marks = Marks(args.near == "true")
        self.kind = args.rows
        self.lengths: Any = Lengths()
        self.usable = self.chats = self.read = 0

    def say(self, text: str = "") -> None:
        from ..data.show import folded

        for line in folded(text, self.width) if self.folds and text else (text,):
            self.console.say(line)

    def run(self) -> int:
        from ..data import DataError

        tokenizer = self._tokenizer()
        failed = ""
        try:
            self._pass(tokenizer)
        except DataError as error:
            if not self.read and not self.left_out.total:
                raise
            failed = str(error)  # what was read until there is told
        return self._told(failed)

    def _tokenizer(self) -> Any:
        """The rows' tokenizer, or None: texts alone are looked at."""
        from ..data import RowTokenizer
        from ..train.data_options import truncation
        from ..train.model import load_tokenizer
        from ..train.start import find_model, model_limits

        args = self.args
        if not args.model_name_or_path:
            return None
        name = find_model(args.model_name_or_path)
        tokenizer = load_tokenizer(name, args.gguf_file, args.chat_template)
        limits = model_limits(name, args.gguf_file, self.say)
        return RowTokenizer(tokenizer, truncation(args), self.left_out, self.say, limits)

    def _rows(self, source: str, left_out: Any) -> Iterator[Any]:
        from ..data import JudgedReader, PairReader
        from ..data.judged import peeked
        from ..data.survey import JudgedLengths
        from ..train.data_options import columns

        names = columns(self.args)
        kind, given = peeked(source, names)
        if self.kind == "auto":
            self.kind = kind
        if self.kind != "pairs" and not self.read:
            self.lengths = JudgedLengths(self.kind)
        reader: Any = (
            PairReader(left_out, names)
            if self.kind == "pairs"
            else JudgedReader(self.kind, left_out, names)
        )
        yield from reader.read(source, given)
        for remark in reader.remarks(source):
            left_out.once(remark)

    def _pass(self, tokenizer: Any) -> None:
        from ..data import LeftOut, RowTokenizer

        whole = (
            None
            if tokenizer is None
            else RowTokenizer(tokenizer.tokenizer, None, LeftOut(keep=0), warn=lambda text: None)
        )
        left, told = self.args.show if not self.args.json else 0, time.monotonic()
        for pair in self._rows(self.args.file, self.left_out):
            self.read += 1
            self.chats += pair.conversational
            self.marks.add(pair)
            if tokenizer is None:
                self.usable += 1
                self.lengths.add_texts(pair)
            elif (ids := tokenizer.of(pair)) is not None:
                self.usable += 1
                self.lengths.add_tokens(ids)
                if left:
                    left -= 1
                    self._show(pair, ids, whole)
            if time.monotonic() - told >= SILENCE:
                told = time.monotonic()
                self.say(f"{self.read:,} rows read")

    def _show(self, pair: Any, ids: Any, whole: Any) -> None:
        from ..data.show import legend, shown_pair

        choice = self.args.color
        colour = choice == "always" or (
            choice == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        )
        if not self.lengths.pairs > 1:
            self.say(legend(colour))
        for line in shown_pair(ids, whole.of(pair), whole.tokenizer, self.width, colour):
            self.say(line)
        self.say()

    def _findings(self) -> list[Any]:
        from ..data import LeftOut, NoUsableRow
        from ..data.survey import Finding, Marks, leaks, repeats
        from ..data.tokenize import DOUBLED_END, NO_END

        found = repeats(self.marks, single=self.kind == "unpaired")
        if self.args.eval_file:
            held_out = Marks(self.marks.near)
            with contextlib.suppress(NoUsableRow):
                for pair in self._rows(self.args.eval_file, LeftOut(keep=0)):
                    held_out.add(pair)
            found += leaks(self.marks, held_out)
        for note in (DOUBLED_END, NO_END):
            if n := self.left_out.notes.get(note, 0):
                found.append(Finding(note, n, f"{n} {note}", True))
        return found

    def _told(self, failed: str) -> int:
        left_out, say, args = self.left_out, self.say, self.args
        findings = self._findings()
        wrong = bool(failed or left_out.total or not self.usable or any(f.wrong for f in findings))
        if args.json:
            print(json.dumps(self._as_json(failed, findings, wrong), ensure_ascii=True, indent=1))
            return int(wrong)
        if failed:
            say(failed)
        if self.lengths.unit == "tokens":
            middle = self.lengths.middle()
            say(f"tokens of a sequence: median below {middle}, longest {self.lengths.longest}")
        noun = {"unpaired": "labelled completions", "ranked": "ranked lists"}.get(
            self.kind, "pairs"
        )
        say(f"{self.usable} usable {noun} ({self.chats} of {self.read} read are conversational)")
        plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
        for line in self.lengths.lines(min(self.width, 80), plain):
            say(line)
        for remark in left_out.remarks():
            say(remark)
        for finding in findings:
            say(f"{'wrong: ' if finding.wrong else ''}{finding}")
        say(left_out.summary())
        if left_out.total > len(left_out.shown()) and not args.left_out:
            say("--left_out FILE writes each of them")
        return int(wrong)

    def _as_json(self, failed: str, findings: list[Any], wrong: bool) -> dict[str, Any]:
        left_out = self.left_out
        return {
            "file": self.args.file,
            "rows": "pairs" if self.kind == "auto" else self.kind,
            "wrong": wrong,
            "error": failed or None,
            "read": self.read,
            "usable": self.usable,
            "conversational": self.chats,
            "left_out": left_out.counts(),
            "left_out_rows": [vars(p) for p in left_out.problems],
            "said": left_out.said(),
            "notes": dict(left_out.notes),
            "findings": [vars(f) for f in findings],
            "lengths": self.lengths.as_json(),
        }
