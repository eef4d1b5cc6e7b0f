"""The reference's log-probs of a framework's batches, from the cache on disk or into it.

`reference_cache=` of `FusedOptions` and `patch_trl`: a folder. Rows are computed as they come, and
never again: not in the next epoch, nor by another run, whatever its loss, beta, learning rate or
`ld_alpha`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..models.reference_cache import (
    ReferenceCache,
    reference_identity,
    sequence_key,
    sequences_of,
)

# Beside these a batch holds what changes the values and is not in their names: pictures, say.
_NAMED = {"input_ids", "attention_mask", "use_cache", "labels", "completion_mask"}


class CachedReference:
    """A cache, opened when the reference is first asked."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.cache: ReferenceCache | None = None

    def logps(
        self,
        inputs: Mapping[str, Any],
        labels: Tensor,
        dtype: torch.dtype,
        reference: Callable[[], AbstractContextManager[Any]],
        score: Callable[[Any], Tensor],
    ) -> Tensor:
        """[2B, T - 1] log-probs of the scored tokens of a batch, 0 elsewhere.

        `reference()` gives the model, ready to be called; `score(model)` its log-probs.
        """
        if set(inputs) - _NAMED:
            with reference() as model:
                return score(model)
        if self.cache is None:
            with reference() as model:
                identity = reference_identity(model, dtype)
            self.cache = ReferenceCache(self.folder, identity, warnings.warn)
        scored = labels[:, 1:] != -100
        sequences = sequences_of(inputs["input_ids"], inputs.get("attention_mask"), labels)
        keys = [sequence_key(s) for s in sequences]
        found = self.cache.get(keys)
        if found is not None:
            logps = torch.zeros(scored.shape, dtype=found[0].dtype, device=labels.device)
            logps[scored] = torch.cat(found).to(labels.device)
            return logps
        with reference() as model:
            logps = score(model)
        counts = scored.sum(1).tolist()
        if counts == [s.num_scored for s in sequences]:  # not so where nothing is before a row
            self.cache.put(keys, list(logps[scored].split(counts)))
            self.cache.refresh()
        return logps


def cache_of(trainer: Any) -> CachedReference | None:
    """The trainer's cache; None where it has none, or where its reference cannot be named."""
    folder = trainer.fused.reference_cache
    if folder is None or getattr(trainer.args, "sync_ref_model", False):
        return None
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        if not getattr(trainer, "_cache_refused", False):
            trainer._cache_refused = True
            warnings.warn("reference_cache: not used with weights in shards", stacklevel=2)
        return None
    if getattr(trainer, "_reference_cache", None) is None:
        trainer._reference_cache = CachedReference(str(folder))
    return trainer._reference_cache
