"""The reference's log-probs of a framework's batches, from the cache on disk or into it.

`reference_cache=` of `FusedOptions` and `patch_trl`: a folder. Rows are computed as they come, and
never again: not in the next epoch, nor by another run, whatever its loss, beta, learning rate or
`ld_alpha`. Where nothing can be kept, that is said once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.reference_cache import (
    ReferenceCache,
    reference_identity,
    sequence_key,
    sequences_of,
    weights_in_force,
)
from ..models.structure import base_model_of, unwrapped

# Beside these a batch holds what changes the values and is not in their names: pictures, say.
_NAMED = {"input_ids", "attention_mask", "use_cache", "labels", "completion_mask"}
_SAMPLE = 16  # elements of each weight that are looked at, to see whether a model has moved
_MOVES = 3  # times that a reference may be another before it is taken for one that follows
OF_STATES = "the loss compares whole distributions, of which nothing is kept"
_FOLLOWS = "the reference changes while it is used"


class CachedReference:
    """A cache, opened when the reference is first asked.

    `moves`: the reference is the user's to change, and is looked at each time.
    """

    def __init__(self, folder: str, moves: bool = False) -> None:
        self.folder, self.moves = folder, moves
        self.cache: ReferenceCache | None = None
        self._seen: object = None
        self._moved = 0
        self._said: set[str] = set()

    def unused(self, why: str) -> None:
        """Say once that nothing is kept, and why."""
        if why not in self._said:
            self._said.add(why)
            warnings.warn(f"reference_cache: not used ({why})", stacklevel=3)

    def logps(
        self,
        inputs: Mapping[str, Any],
        labels: Tensor,
        reference: Callable[[], AbstractContextManager[Any]],
        score: Callable[[Any], Tensor],
    ) -> Tensor:
        """[2B, T - 1] log-probs of the scored tokens of a batch, 0 elsewhere.

        `reference()` gives the model, ready to be called; `score(model)` its log-probs.
        """
        others = sorted(set(inputs) - _NAMED)
        if others:
            self.unused(f"the values depend on {', '.join(others)} of the batch as well")
        if others or self._moved > _MOVES or not self._open(reference):
            with reference() as model:
                return score(model)
        assert self.cache is not None
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
            self.cache.put(keys, list(logps[scored.to(logps.device)].split(counts)))
            self.cache.refresh()
        return logps

    def _open(self, reference: Callable[[], AbstractContextManager[Any]]) -> bool:
        """Whether there is a cache of the reference as it is now."""
        if self.cache is not None and not self.moves:
            return True
        with reference() as model:
            if in_shards(model):
                self.unused("the weights are in shards")
                return False
            seen = _marks(model) if self.moves else None
            if self.cache is not None and seen == self._seen:
                return True
            self._moved += self.cache is not None
            if self._moved > _MOVES:
                self.unused(_FOLLOWS)
                return False
            identity = reference_identity(model, _computed_in(model))
        if self.cache is not None:
            self.cache.close()
        self.cache, self._seen = ReferenceCache(self.folder, identity, warnings.warn), seen
        return True


def in_shards(model: nn.Module) -> bool:
    """Whether a rank has parts of the weights alone: FSDP, ZeRO-3."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        return True
    return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())


@torch.no_grad()
def _computed_in(model: nn.Module) -> torch.dtype:
    """The dtype in which the model computes, here and now.

    accelerate puts autocast around the forward, so it is looked at from within one.
    """
    base = base_model_of(model)
    head = base.get_output_embeddings()
    found: list[torch.dtype] = []

    def look(*_: Any) -> None:
        if torch.is_autocast_enabled(device.type):
            found.append(torch.get_autocast_dtype(device.type))

    device = next(head.parameters()).device
    with head.register_forward_pre_hook(look):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
    return found[0] if found else base.dtype


@torch.no_grad()
def _marks(model: nn.Module) -> object:
    """What tells that a model is another than it was: adapters in force, some of each weight."""
    found = weights_in_force(unwrapped(model))
    weights = [weight for weight, _ in found.values()]
    versions = sum(w._version for w in weights if not w.is_inference())
    some = [w.detach().reshape(-1)[:: max(w.numel() // _SAMPLE, 1)].double() for w in weights]
    values = torch.cat([s.to(some[0].device) for s in some]).cpu().numpy().tobytes()
    return {adapter for _, adapter in found.values()}, versions, values


_of_models: weakref.WeakKeyDictionary[Any, CachedReference] = weakref.WeakKeyDictionary()


def cache_of_model(model: nn.Module, folder: str | None) -> CachedReference | None:
    """The cache of a model in a loop of the user's own, who may change it between calls."""
    if folder is None:
        return None
    known = _of_models.get(model)
    if known is None or known.folder != str(folder):
        known = _of_models[model] = CachedReference(str(folder), moves=True)
    return known


def cache_of(trainer: Any) -> CachedReference | None:
    """The trainer's cache; None where it has none, or where its reference cannot be named."""
    folder = trainer.fused.reference_cache
    if folder is None:
        return None
    if getattr(trainer, "_reference_cache", None) is None:
        trainer._reference_cache = CachedReference(str(folder))
    cache: CachedReference = trainer._reference_cache
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    moves = any(type(c).__name__ == "SyncRefModelCallback" for c in callbacks)
    if moves or getattr(trainer.args, "sync_ref_model", False):
        cache.unused("the reference follows the policy")
        return None
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        cache.unused("the weights are in shards")
        return None
    return cache
