"""Figures of a GPU run, with the percent of their floor: a program that prints JSON.

First the kernels alone, without Python between them: forward (one read of the logits) and backward
in place (one read and one write) in percent of a large device-to-device copy's bandwidth. Then the
quick cases of the benchmarks, with every peer that is installed. Times are medians of device
events, with the 20th and 80th percentile.

    python benchmarks/gpu_figures.py --json FILE
    python benchmarks/gpu_figures.py --json FILE --rehearse  # tiny, on the host: not figures
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from dpo_kernels.backends import available, load  # noqa: E402
from dpo_kernels.bench import cases, measure, results  # noqa: E402
from dpo_kernels.transform import LogitTransform  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
IGNORE = -100
VOCABULARIES = {"Llama-2": 32000, "GPT-2": 50257, "Llama-3": 128256, "Qwen2.5": 151936,
                "Gemma 3": 262144}  # fmt: skip
ROWS = 4096


def timed(call, repeats=20) -> dict[str, float]:
    """Milliseconds of `call` on the device, behind a flushed cache."""
    for _ in range(3 if GPU else 1):
        call()
    values = [
        1e3 * measure.clock(call, lambda: None, DEVICE, host_bound=False)
        for _ in range(repeats if GPU else 2)
    ]
    values.sort()
    return {
        "ms": statistics.median(values), "p20": values[len(values) // 5],
        "p80": values[-1 - len(values) // 5],
    }  # fmt: skip


def copy_bandwidth(gigabytes: float) -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    size = int(gigabytes * 2**30)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source))["ms"] / 1e6


def from_logits(bandwidth: float, rows: int, V: int) -> dict[str, dict]:
    """The kernels alone, bf16, every row scored: percent of the copy bandwidth."""
    logits = torch.randn(1, rows, V, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, V, (1, rows), device=DEVICE)
    grad = torch.randn(1, rows, device=DEVICE)
    plain = LogitTransform()
    size = logits.numel() * logits.element_size()
    found = {}
    for name in ("triton", "cuda"):
        if name not in available():
            continue
        kernels = load(name)
        lse = kernels.token_logps(logits, targets, IGNORE, plain, ())[1]
        work = logits.clone()
        calls = {
            "forward": (1, lambda k=kernels: k.token_logps(logits, targets, IGNORE, plain, ())),
            "backward in place": (
                2,
                lambda k=kernels, lse=lse, work=work: k.token_logps_backward(
                    grad, work, targets, lse, IGNORE, plain, work
                ),
            ),
        }
        for what, (passes, call) in calls.items():
            result = timed(call)
            rate = passes * size / result["ms"] / 1e6
            found[f"{name} {what}"] = result | {
                "GB/s": rate, "percent of copy": 100 * rate / bandwidth
            }  # fmt: skip

    def eager():
        return logits[0].float().log_softmax(-1).gather(-1, targets[0, :, None])

    if 12 * size < free_memory():
        found["torch eager forward"] = timed(eager)
    return found


def free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if GPU else 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the host")
    options = parser.parse_args()
    if options.rehearse and not GPU:
        from dpo_kernels.backends import cuda
        from tests.cuda_on_host import build

        cuda.on_host = build.module()
    torch.manual_seed(0)
    figures: dict = {}

    def keep(section: str, case: str, result) -> None:
        figures.setdefault(section, {})[case] = result
        # After every case: what a time limit cuts off does not take the rest with it.
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
        print(section, case, json.dumps(result), flush=True)

    tiny = options.rehearse
    bandwidth = copy_bandwidth(0.001 if tiny else 4)
    keep("copy", "GB/s, read plus written", bandwidth)
    for model, V in list(VOCABULARIES.items())[: 1 if tiny else None]:
        rows, V = (3, V // 64) if tiny else (ROWS, V)
        keep("from logits", f"{model} {rows} x {V}", from_logits(bandwidth, rows, V))
    for case in rehearsed() if tiny else cases.quick(DEVICE):
        # Without what compiles for half a minute: the time is short.
        for m in measure.measure(case, DEVICE, 10 if GPU else 1, without=("torch.compile",)):
            keep(case.name, m.provider, results.as_row(m))


def rehearsed() -> list[cases.Case]:
    cases.MODELS["tiny"] = cases.Model(64, 211)
    suites = ("small batch", "linear trained", "linear frozen", "linear reference")
    return [cases.Case(suite, "tiny", "bf16", 16, 0.6) for suite in suites]


if __name__ == "__main__":
    main()
