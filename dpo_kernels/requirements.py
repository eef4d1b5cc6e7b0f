"""What must be installed beside the package, and in which versions; imports none of it.

pyproject.toml states the same bounds for installers (a test holds the two together). They are
checked again here because an environment changes after the installation.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib import metadata
from pathlib import Path

OLDEST = {"torch": (2, 6), "triton": (3, 2), "transformers": (4, 51)}


def version_of(package: str) -> str | None:
    """The installed version of an import package, without importing it; None if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        pass  # nightly and ROCm builds of Triton have names of their own
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).read_text(errors="replace")
    match = re.search(r"^__version__ = [\"']([^\"']+)", text, re.MULTILINE)
    return match[1] if match else "unknown"


def why_not(package: str) -> str:
    """Why an installed `package` cannot serve: absent or too old, and the fix; empty if it can."""
    version, oldest = version_of(package), OLDEST[package]
    wanted = f"{package}>={'.'.join(map(str, oldest))}"
    if version is None:
        return f"the package {package} is not installed: pip install '{wanted}'"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < oldest:
        return f"{package} {version} is too old: pip install -U '{wanted}'"
    return ""


@functools.cache
def torch_problem() -> ImportError | None:
    """The error to raise where torch cannot be used, its cause attached; None where it can."""
    if reason := why_not("torch"):
        return ImportError(reason)
    try:
        import torch  # noqa: F401
    except Exception as error:  # OSError for a missing library, but builds fail in many ways
        lines = str(error).splitlines()
        first = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        spec = importlib.util.find_spec("torch")
        found = f"torch {version_of('torch')}, {spec and spec.origin}"
        problem = ImportError(
            f"{found}, does not load ({first}): reinstall it ('pip install --force-reinstall "
            "torch', with the index of the CUDA or CPU build you want) and see that no other "
            "environment is on PYTHONPATH or LD_LIBRARY_PATH"
        )
        problem.__cause__ = error
        return problem
    return None
