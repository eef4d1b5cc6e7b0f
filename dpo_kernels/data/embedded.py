"""The data and model recipe that ship with the package, for a first run without downloads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any


@contextmanager
def folder() -> Iterator[Path]:
    """The folder of the embedded default: train.jsonl, eval.jsonl, tokenizer, config, recipe."""
    with resources.as_file(resources.files("dpo_kernels.data").joinpath("default")) as path:
        yield path


def recipe() -> dict[str, Any]:
    """Its settings: {"sft": {...}, "dpo": {...}, "sample": {...}, "seed": ...}."""
    with folder() as path:
        return json.loads((path / "recipe.json").read_text(encoding="utf-8"))
