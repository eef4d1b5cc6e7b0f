"""The reference of `score`: a model, a cache of its log-probs, or a model with what it lacks.

A cache is named by its folder, as training has it (`reference_cache`). With a model beside it, what
it lacks is computed and kept. Without one it must hold every row: the log-probs of a reference that
is not here any more, or too large to load, are enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..data import TokenPair, TokenSequence
from ..models.reference_cache import ReferenceCache, reference_identity, sequence_key
from .config import UserError
from .model import Policy

Scored = TokenPair | TokenSequence
Logps = list[list[list[float]]]  # of each row, of each of its sides, of each scored token


class ScoreReference:
    """Log-probs of the reference, row by row."""

    def __init__(
        self,
        model: Policy | None,
        folder: str | None,
        compute: Callable[[Policy, list[Scored]], Logps],
        say: Callable[[str], None],
    ) -> None:
        self.model, self.compute, self.say = model, compute, say
        self.cache: ReferenceCache | None = None
        self.found = self.computed = 0  # rows
        if folder is not None:
            self.cache = _opened(Path(folder).expanduser(), model, say)
            say(f"reference cache: {self.cache.path}, {len(self.cache)} sequences")

    def of(self, rows: list[Scored]) -> Logps:
        """The log-probs of these rows; `UserError` where neither cache nor model has them."""
        if self.cache is None:
            assert self.model is not None
            return self.compute(self.model, rows)
        values = [self._kept(self.cache, row) for row in rows]
        missing = [i for i, found in enumerate(values) if found is None]
        self.found += len(rows) - len(missing)
        if missing:
            if self.model is None:
                raise UserError(
                    f"{rows[missing[0]].source}: the reference cache {self.cache.path} does not "
                    "hold this row (tokenizer, template and max_length must be those it was made "
                    "with); pass ref_model_name_or_path to compute what it lacks"
                )
            self.computed += len(missing)
            lacking = [rows[i] for i in missing]
            for i, logps in zip(missing, self.compute(self.model, lacking), strict=True):
                values[i] = logps
            self._keep(self.cache, lacking, [values[i] or [] for i in missing])
        return [found or [] for found in values]

    def close(self) -> None:
        if self.cache is not None:
            self.say(f"reference: {self.found} rows from the cache, {self.computed} computed")
            self.cache.close()

    def _kept(self, cache: ReferenceCache, row: Scored) -> list[list[float]] | None:
        found = cache.get([sequence_key(s) for s in _sides(row)])
        return None if found is None else [v.double().tolist() for v in found]

    def _keep(self, cache: ReferenceCache, rows: list[Scored], values: Logps) -> None:
        keys = [sequence_key(s) for row in rows for s in _sides(row)]
        cache.put(keys, [torch.tensor(v, dtype=torch.float64) for each in values for v in each])
        cache.refresh()


def _sides(row: Scored) -> Sequence[TokenSequence]:
    return row.sequences if isinstance(row, TokenPair) else (row,)


def _opened(folder: Path, model: Policy | None, say: Callable[[str], None]) -> ReferenceCache:
    """The cache of the model, or without one the only one that the folder holds."""
    try:
        if model is not None:
            return ReferenceCache(folder, reference_identity(model.model, model.dtype), say)
        told = [folder / "identity.json"] if (folder / "identity.json").is_file() else []
        told = told or sorted(folder.glob("*/identity.json"))
        if len(told) != 1:
            names = ", ".join(file.parent.name for file in told[:4])
            raise UserError(
                f"reference_cache: {folder} holds the log-probs of {len(told)} references"
                + (f" ({names}): name the folder of one, or " if told else "; ")
                + "pass ref_model_name_or_path"
            )
        identity = json.loads(told[0].read_text(encoding="utf-8"))
        cache = ReferenceCache(told[0].parent.parent, identity, say)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"reference_cache: {folder} cannot be used: {error}") from None
    if cache.path.resolve() != told[0].parent.resolve():
        raise UserError(f"reference_cache: {told[0]} is not of the folder that it stands in")
    return cache
