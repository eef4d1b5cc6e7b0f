"""`dpo-kernels iterate`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, get_type_hints

from ..train.config import ALIASES
from ..train.run_options import GROUPS
from .options_of import add_options, given, printed

_PER_ROUND = (
    "dataset_name",
    "eval_file",
    "overwrite_output_dir",
    "ref_model_name_or_path",
    "resume_from_checkpoint",
)


def add(commands: Any) -> None:
    from ..iterate.command_options import IterateConfig

    iterate = commands.add_parser(
        "iterate",
        help="rounds of sampling, judging and training",
        usage="dpo-kernels iterate [CONFIG.yaml] [OPTIONS]",
        description="The policy improves on its own judged samples: sample, judge, pair, train, "
        "evaluate, promote. Called again with the same --output_dir it goes on where it was. The "
        "options of `train` go to each round's training. Without a model and prompts it takes the "
        "embedded model, its prompts and a judge by rule.",
        epilog="example: dpo-kernels iterate --model_name_or_path ./policy --prompts p.jsonl "
        "--judge llm --base_url http://127.0.0.1:8000/v1 --model judge --output_dir runs/loop",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    mine = {f.name for f in dataclasses.fields(IterateConfig)}
    groups = [_without(group, {*mine, *_PER_ROUND}) for group in GROUPS]
    aliases = {a: n for a, n in ALIASES.items() if n not in {*mine, *_PER_ROUND}}
    add_options(iterate, (IterateConfig, *groups), aliases, skip=("extra_body",))
    iterate.set_defaults(run=run, command=iterate, trl=True)


def _without(group: Any, names: set[str]) -> Any:
    """A group of options less those of these names."""
    hints = get_type_hints(group)
    kept = [(f.name, hints[f.name], f) for f in dataclasses.fields(group) if f.name not in names]
    made: Any = dataclasses.make_dataclass(
        group.__name__, [(name, hint, _copy(f)) for name, hint, f in kept]
    )
    made.__doc__ = f"training of a round: {group.__doc__}"
    return made


def _copy(f: Any) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=f.default_factory, metadata=f.metadata)
    return dataclasses.field(default=f.default, metadata=f.metadata)


def run(args: argparse.Namespace) -> int:
    from ..iterate.rounds import resolve, run_iteration
    from ..train.console import Console

    options = given(args)
    if printed(args, resolve(options)[0]):
        return 0
    console = Console()
    with console.signals():
        summary = run_iteration(options, console)
    return 1 if summary["waits"] else 0
