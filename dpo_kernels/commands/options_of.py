"""Options of a command drawn from dataclasses, as transformers' `HfArgumentParser` reads them.

Lists take several values, a switch may stand bare (`--bf16`), with a value (`--bf16 false`) or
negated (`--no_bf16`), dashes and underscores are one (a test holds all this to `HfArgumentParser`
over the same dataclass). It is not used itself: it fills in every default, so that one would not
know what was given over a configuration file; it cannot take `none`; and `--help` would wait for
transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

PRINT_CONFIG = "print_config"


def add_options(
    parser: argparse.ArgumentParser,
    groups: Iterable[Any],
    aliases: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
) -> None:
    """One option for each field of the dataclasses, each in a group of its own.

    `aliases`: other name -> name of the field; `defaults`: those that differ here. Of what is not
    given the namespace has nothing, if the parser was made with
    `argument_default=argparse.SUPPRESS`.
    """
    for kind in groups:
        hints = get_type_hints(kind)
        group = parser.add_argument_group(kind.__doc__)
        for field in dataclasses.fields(kind):
            if field.name not in skip:
                names = [field.name, *(a for a, name in aliases.items() if name == field.name)]
                _add(group, names, field, hints[field.name], defaults or {})
    parser.add_argument(
        f"--{PRINT_CONFIG}",
        action="store_true",
        help="print the resolved configuration as YAML, and end",
    )


def _add(group: Any, names: list[str], field: Any, hint: Any, defaults: Mapping[str, Any]) -> None:
    shown = _default(field, defaults)
    text = field.metadata["help"] + ("" if shown is None else f" (default: {shown})")
    group.add_argument(
        *(f"--{name}" for name in names),
        dest=field.name,
        help=text.replace("%", "%%"),
        **argument(hint, field.metadata.get("choices")),
    )
    if bool in (hint, *get_args(hint)):
        group.add_argument(
            f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS
        )


def _default(field: Any, defaults: Mapping[str, Any]) -> str | None:
    """A field's default in words; None where it has none."""
    default = defaults.get(field.name, field.default)
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, list):
        return " ".join(map(str, default))
    return None if default is None else str(default)


def options_markdown(groups: Iterable[Any], skip: Iterable[Any] = ()) -> str:
    """The options as Markdown tables, a group each: docs/options.md, by tools/readme_tables.py.

    `skip`: groups whose options have been shown.
    """
    seen = {f.name for group in skip for f in dataclasses.fields(group)}
    lines: list[str] = []
    for group in groups:
        rows = [f for f in dataclasses.fields(group) if f.name not in seen]
        if not rows:
            continue
        lines += [f"### {str(group.__doc__).capitalize()}", ""]
        lines += ["| option | default | |", "|---|---|---|"]
        for field in rows:
            text = field.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
            choices = field.metadata.get("choices")
            if choices and not all(choice in text for choice in choices):
                text += f" ({', '.join(choices)})"
            shown = _default(field, {})
            lines.append(f"| `{field.name}` | {'' if shown is None else f'`{shown}`'} | {text} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def argument(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """argparse's keywords for a field's type; `None` can be written as none."""
    optional = type(None) in get_args(hint)
    kind = next(k for k in get_args(hint) if k is not type(None)) if optional else hint

    def convert(text: str) -> Any:
        if optional and text.lower() in ("none", "null"):
            return None
        if kind is dict:
            return json.loads(text)
        return boolean(text) if kind is bool else kind(text)

    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        metavar = "TEXT" if inner is str else inner.__name__.upper()
        return {"nargs": "+", "type": inner, "metavar": metavar}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": convert, "metavar": "BOOL"}
    if choices and not optional:
        return {"choices": choices}
    if kind is dict:
        convert.__name__ = "JSON"
        return {"type": convert, "metavar": "JSON"}
    convert.__name__ = kind.__name__
    return {"type": convert, "metavar": "TEXT" if kind is str else kind.__name__.upper()}


def boolean(text: str) -> bool:
    """A switch's value, as `HfArgumentParser` has it."""
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given: of the configuration file, under those of the command line."""
    ours = ("run", "layer", PRINT_CONFIG, "dry_run")
    return {**getattr(args, "layer", {}), **{k: v for k, v in vars(args).items() if k not in ours}}


def run_job_of(
    args: argparse.Namespace,
    resolved: Callable[[dict[str, Any]], Any],
    groups: Iterable[Any],
    job: Callable[[dict[str, Any], Any], Any],
    dry: Callable[[dict[str, Any], Any], Any],
) -> int:
    """Run the job of these options, or say what it would do, or print its configuration."""
    options = given(args)
    if hasattr(args, PRINT_CONFIG):
        from ..train.config_files import yaml_text

        print(yaml_text(resolved(options), groups), end="")
        return 0
    from ..train.console import Console

    console = Console()
    with console.signals():
        (dry if hasattr(args, "dry_run") else job)(options, console)
    return 0


def printed(args: argparse.Namespace, config: Any) -> bool:
    """Print the resolved configuration if --print_config asks for it."""
    if not hasattr(args, PRINT_CONFIG):
        return False
    from ..train.config_files import yaml_text

    print(yaml_text(config, [type(config)]), end="")
    return True
