"""Which kernels, as they are now, have passed their tests on a GPU.

`make gpu-check` runs the tests marked `gpu` and writes a results file with the sha256 of every
kernel source; `gpu_verified.json` beside this file keeps the newest pass of each kernel, drawn from
those files. A kernel whose sources have changed since is not verified, nor one that never ran.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE / "gpu_verified.json"

# kernel -> the functions of its backend's module that launch it. A kernel is named after its file.
KERNELS = {
    "triton/token_logps": ("token_logps", "token_logps_backward"),
    "triton/token_kl": ("token_kl", "token_kl_backward"),
    "triton/sequence_sum": ("sequence_sum", "sequence_sum_backward"),
    "triton/pair_loss": ("pair_loss_forward",),
    "triton/scaled_copy": ("scaled_copy",),
    "cuda/token_logps": ("token_logps",),
    "cuda/token_logps_backward": ("token_logps_backward",),
    "cuda/sequence_sum": ("sequence_sum", "sequence_sum_backward", "ordinary_sums_backward"),
    "cuda/pair_loss": ("pair_loss_forward", "ordinary", "ordinary_fields"),
}


@dataclass(frozen=True)
class Verification:
    """Where and when a kernel's present sources passed, or why that is not known."""

    kernel: str
    verified: bool
    why: str  # one line for people


def sources(kernel: str) -> dict[str, str]:
    """sha256 of each source that `kernel` is made from, by file; empty where it is not built.

    Of CUDA kernels the sources that were compiled into this installation, and every header counts
    for every kernel.
    """
    backend, _, name = kernel.partition("/")
    if backend == "triton":
        folder = HERE / "backends" / "triton"
        return {f"triton/{n}.py": _sha256(folder / f"{n}.py") for n in _triton_files(folder, name)}
    hashes = _cuda_hashes()
    own = f"cuda/{name}.cu"
    return (
        {f: h for f, h in hashes.items() if f == own or f.endswith(".h")} if own in hashes else {}
    )


def _triton_files(folder: Path, name: str) -> list[str]:
    """A kernel's file and those of the folder that it imports."""
    found, queue = [], [name]
    while queue:
        file = queue.pop()
        found.append(file)
        imported = re.findall(r"^from \.(\w+) import", (folder / f"{file}.py").read_text(), re.M)
        queue += [other for other in imported if other not in found]
    return found


def digest(hashes: Mapping[str, str]) -> str:
    """One sha256 of the sources of a kernel."""
    text = "\n".join(f"{file}={sha}" for file, sha in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def state() -> list[Verification]:
    """Every kernel of this installation, verified or not."""
    record = read_record()
    return [_state(kernel, record.get(kernel)) for kernel in KERNELS]


def _state(kernel: str, entry: Mapping[str, Any] | None) -> Verification:
    hashes = sources(kernel)
    if not hashes:
        return Verification(kernel, False, "not in this build")
    if entry is None:
        return Verification(kernel, False, "has not passed all its tests on a GPU")
    ran = f"{entry['device']}, {entry['date']}, commit {entry['commit'][:12]}"
    if entry["sha256"] != digest(hashes):
        changed = sorted(f for f in hashes if entry["sources"].get(f) != hashes[f])
        return Verification(kernel, False, f"{', '.join(changed)} changed since {ran}")
    return Verification(kernel, True, f"passed {entry['tests']} tests on {ran}")


def read_record() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text())


def draw_record(results: Path) -> dict[str, dict[str, Any]]:
    """What `gpu_verified.json` must hold: the newest pass of each kernel among the results files.

    A run that was cut off, or ran a part of the tests, verifies nothing.
    """
    record: dict[str, dict[str, Any]] = {}
    files = [
        json.loads(path.read_text()) | {"file": path.name} for path in results.glob("gpu-*.json")
    ]
    for run in sorted((f for f in files if f["complete"]), key=lambda run: run["date"]):
        for kernel, result in run["kernels"].items():
            if result["passed"] and not result["failed"]:
                record[kernel] = {
                    "sha256": digest(result["sources"]),
                    "sources": result["sources"],
                    "tests": result["passed"],
                    "device": run["device"],
                    "date": run["date"],
                    "commit": run["commit"],
                    "results": run["file"],
                }
    return record


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _cuda_hashes() -> dict[str, str]:
    try:
        from . import _C
    except ImportError:
        return {}
    listed = getattr(_C, "cuda_source_hashes", "")
    return dict(entry.split("=", 1) for entry in listed.split(",") if entry)
