"""Peak memory of one call of one provider, above its inputs.

On CPUs the peak resident set of a fresh process, which this module is as a program: whatever ran
before would leave its pages. On GPUs the allocator's peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .cases import MODELS, Case, Model
from .measure import _FORWARD, Measurement, make_inputs


def peak_bytes(case: Case, provider: str, device: str) -> int | str:
    """Bytes above the inputs at the peak of a call with its gradients; or why there is none."""
    if device == "cuda":
        return _call(case, provider, device)
    words = [json.dumps(asdict(case)), json.dumps(asdict(case.shape)), provider]
    done = subprocess.run(
        [sys.executable, "-m", "dpo_kernels.bench.peak_memory", *words],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        return lines[-1][:200]
    return int(done.stdout.split()[-1])


def weigh(case: Case, provider: str, device: str) -> Measurement:
    """`peak_bytes` as a measurement: the bytes, or the reason as its note."""
    found = peak_bytes(case, provider, device)
    result = Measurement(case, provider, ours=provider.startswith("dpo-kernels"))
    if isinstance(found, str):
        result.note = found
    else:
        result.peak_bytes = found
    return result


def _call(case: Case, name: str, device: str) -> int | str:
    from .providers import Absent, providers

    try:
        provider = dict(providers(case, device))[name]()
    except Absent as why:
        return f"absent: {why}"
    inputs = make_inputs(case, device)
    small = make_inputs(_tiny(case), device)

    def call(x) -> None:
        if case.suite in _FORWARD:
            with torch.no_grad():
                provider.call(x)
        elif case.suite == "training step":
            provider.call(x)
        else:
            provider.call(x).backward()

    call(small)  # what is loaded and compiled once is not the call's
    if device == "cuda":
        del small
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    call(inputs)
    return _resident("VmHWM") - before


def _tiny(case: Case) -> Case:
    return Case(case.suite, case.model, case.dtype, 8 * case.pairs, case.fraction, case.pairs)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux alone")


def main() -> None:
    case, shape, provider = sys.argv[1:]
    parsed = Case(**json.loads(case))
    MODELS.setdefault(parsed.model, Model(**json.loads(shape)))
    result = _call(parsed, provider, "cpu")
    if isinstance(result, str):
        sys.exit(result)
    print(result)


if __name__ == "__main__":
    main()
