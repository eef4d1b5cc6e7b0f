"""Configurations in files: read from YAML and JSON, written as either."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

from .run_options import GROUPS


class UserError(ValueError):
    """A mistake in what the user asked for: one clear line, no traceback."""


def typed(name: str, value: Any, hint: Any, one: bool = False) -> Any:
    """The value as an option of this type has it, else `UserError`; `one`: may stand for a list."""
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    for kind in kinds:
        plain = get_origin(kind) or kind
        if plain is list:
            inner = get_args(kind)[0]
            items = [value] if one and not isinstance(value, list) else value
            if isinstance(items, list) and all(
                isinstance(v, inner) or (inner is float and isinstance(v, int)) for v in items
            ):
                return items
        elif plain is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
    wanted = " or ".join(getattr(k, "__name__", str(k)) for k in kinds).replace("NoneType", "null")
    raise UserError(f"{name} must be {wanted}, got {value!r}")


YAML = (".yaml", ".yml")
ENDINGS = (*YAML, ".json")


def nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """`; did you mean ...?` with the nearest of the known names, or nothing.

    One of its initials (lr), or the only one that it begins; else nearest by letters; else one with
    all of its words (epochs).
    """
    known = list(known)
    begun = [k for k in known if k.startswith(name)] if len(name) > 2 else []
    near = [k for k in known if len(name) > 1 and name == "".join(w[:1] for w in k.split("_"))]
    near = sorted(near, key=len, reverse=True) or (
        begun if len(begun) == 1 else difflib.get_close_matches(name, known, n=1)
    )
    if not near:
        words = set(name.split("_"))
        near = [k for k in known if words <= set(k.split("_"))]
        near = [k for k in near if k in begun] or near
    return f"; did you mean {before + near[0]!r}?" if near else ""


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file, `--learning-rate`'s dashes read as underscores."""
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"--config: {path} {what}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix in YAML:
            # YAML 1.1 reads 1e-6 as a text (it wants 1.0e-6): read such texts as the numbers meant.
            content = _yaml_numbers(_yaml().load(text, _strict_loader()))
        else:
            content = json.loads(text, object_pairs_hook=_once)
    except UserError:
        raise
    except Exception as error:  # either parser's own error type
        said = " ".join(str(error).split())
        raise UserError(f"--config: {path} cannot be read: {said}") from None
    content = {} if content is None else content  # every line of it is a comment
    if not isinstance(content, dict):
        raise UserError(f"--config: {path} must hold a mapping of options")
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise UserError(f"--config: {path}: an option's name must be a text, got {wrong[0]!r}")
    try:
        return _once((key.replace("-", "_"), value) for key, value in content.items())
    except ValueError as error:
        raise UserError(f"--config: {path}: {error}") from None


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of names that stand there once; either parser would take the last one unseen."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands there twice")
        found[key] = value
    return found


def yaml_text(config: Any, groups: Iterable[Any] = GROUPS) -> str:
    """A configuration as YAML, its groups apart; what `read_config_file` reads gives it again."""
    values = dataclasses.asdict(config)
    lines = []
    for group in groups:
        mine = {f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values}
        if mine:
            text = _yaml().safe_dump(mine, sort_keys=False, allow_unicode=True, width=10**6)
            lines.append(f"# {group.__doc__}\n{text}")
    return "\n".join(lines)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise UserError(
            "a configuration in YAML needs the package pyyaml: pip install pyyaml, or write it "
            "as JSON"
        ) from None
    return yaml


def _strict_loader() -> Any:
    yaml = _yaml()

    def construct_mapping(self: Any, node: Any, deep: bool = False) -> Any:
        names = (k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode))
        _once((name, None) for name in names if name != "<<")
        return yaml.SafeLoader.construct_mapping(self, node, deep)

    return type("Loader", (yaml.SafeLoader,), {"construct_mapping": construct_mapping})


def _yaml_numbers(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    for key, value in content.items():
        if isinstance(value, list):
            content[key] = [_number(v) if key in _NUMBERS else v for v in value]
        elif isinstance(value, str) and key.replace("-", "_") in _NUMBERS:
            content[key] = _number(value)
    return content


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_NUMBERS = {
    f.name for group in GROUPS for f in dataclasses.fields(group) if "float" in str(f.type)
} | {"warmup_ratio"}
