"""`dpo-kernels data check`."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any, get_type_hints

from ..train.config import DPOTrainConfig, UserError, load_config
from .options_of import argument


def add(commands: Any) -> None:
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
        **argument(get_type_hints(DPOTrainConfig)["max_length"], None),
    )
    check.add_argument(
        "--left_out",
        metavar="FILE",
        help="write every row that is left out there, as JSONL (of each kind 20 are printed)",
    )
    check.set_defaults(run=run, command=check)


def run(args: argparse.Namespace) -> int:
    from ..data import LeftOut, NoUsableRow, read_pairs, tokenize_pairs
    from ..train.console import Console
    from ..train.model import load_tokenizer
    from ..train.start import find_model, model_limits

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
