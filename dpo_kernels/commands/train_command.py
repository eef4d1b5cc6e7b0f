"""`dpo-kernels train`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, get_type_hints

from ..train.config import ALIASES, DPOTrainConfig, read_config_file
from .arguments_of import argument


def add(commands: Any) -> None:
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
    train.set_defaults(run=run, command=train)


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
            **argument(hints[field.name], meta["choices"]),
        )


def run(args: argparse.Namespace) -> int:
    from ..train.console import Console
    from ..train.job import run_job

    given = {k: v for k, v in vars(args).items() if k not in ("run", "config")}
    from_file = read_config_file(args.config) if hasattr(args, "config") else {}
    from_file = {ALIASES.get(key, key): value for key, value in from_file.items()}
    console = Console()
    with console.signals():
        run_job({**from_file, **given}, console)
    return 0
