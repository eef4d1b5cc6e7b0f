"""Data sets of the hub, where there is a network and the package `datasets`."""

from __future__ import annotations

from typing import Any

from .left_out import DataError
from .row import EXPECTED
from .table_rows import NEEDS


def hub_dataset(name: str) -> Any:
    """The rows of a data set, streamed: its `train` part, or its only one."""
    missing = f"{name} does not exist, expected {EXPECTED}; as a data set of the hub it"
    try:
        import datasets
    except ImportError:
        raise DataError(f"{missing} needs datasets ({NEEDS})") from None
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{missing} cannot be reached (HF_HUB_OFFLINE is set)")
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
        parts = datasets.load_dataset(name, streaming=True)
    except Exception as error:  # requests', httpx's or datasets' own, by their versions
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{missing} cannot be read ({said})") from None
    if not hasattr(parts, "keys"):
        return parts
    for part in ("train", "train_prefs", *(parts if len(parts) == 1 else ())):
        if part in parts:
            return parts[part]
    raise DataError(f"{name} has the parts {', '.join(parts)}, and none of them is called train")
