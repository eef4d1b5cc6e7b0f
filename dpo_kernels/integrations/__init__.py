"""Existing trainers with the fused head: TRL, transformers' Trainer, Lightning, plain loops.

    from dpo_kernels.integrations import patch_trl, patch_llamafactory, patch_swift

Nothing is imported here before it is asked for: each module asks for its own framework when it is
imported, and says what to install when it is absent.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "patch_trl": "trl",
    "unpatch_trl": "trl",
    "patch_llamafactory": "llamafactory",
    "unpatch_llamafactory": "llamafactory",
    "patch_swift": "swift",
    "unpatch_swift": "swift",
    "BypassedError": "patching",
    "UnsupportedShape": "frameworks",
    "UnsupportedVersion": "frameworks",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
