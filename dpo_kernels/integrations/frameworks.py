"""Which versions of other packages are known here, and what to say about the rest."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..models.versions import number

# Ranges [first, last) of releases; `make test-integrations` runs both ends of each, but for those
# ahead: of TRL and its clients it is the shape of the trainer that decides (`shapes`).
TESTED = {
    "trl": (("0.18", "0.30"), ("1.0", "2")),
    "llamafactory": (("0.9.4", "0.10"),),
    "ms-swift": (("4.0", "5"),),
    "transformers": (("4.51", "6"),),
    "lightning": (("2.4", "3"),),
    "pytorch-lightning": (("2.4", "3"),),
}


class UnsupportedVersion(ImportError):
    """A framework whose version has not been tested with this package."""


class UnsupportedShape(UnsupportedVersion):
    """A framework whose trainer has not the methods that are known here."""


def require(module: str, pip_name: str | None = None) -> Any:
    """Import `module`, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = pip_name or module
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise  # it is there, but something that it needs is not: its own message is better
        raise ImportError(
            f"dpo_kernels.integrations needs {name}: pip install {name}", name=module
        ) from error


def version_of(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_version(package: str, *, allow_untested: bool = False) -> tuple[int, ...]:
    """The installed version; `UnsupportedVersion` outside the tested ranges."""
    found = version_of(package)
    if found is None:
        raise ImportError(f"dpo_kernels.integrations needs {package}: pip install {package}")
    ranges = TESTED[package]
    inside = any(number(first) <= number(found) < number(last) for first, last in ranges)
    if not inside and not allow_untested:
        known = " or ".join(f">={first},<{last}" for first, last in ranges)
        raise UnsupportedVersion(
            f"{package} {found} has not been tested with dpo_kernels; expected {package}{known}. "
            f"Install one of those, or pass allow_untested=True and compare the results yourself"
        )
    return number(found)
