"""The kernels' figures on a GPU, with the percent of their floor: a program that prints JSON.

Floors are measured in the same run: a large device-to-device copy for kernels that move bytes
(forward one read of the logits; backward in place one read and one write), bare matrix products for
the linear head. Times are medians of device events, with the 20th and 80th percentile. Small
batches wait for launches, so they are timed as a program runs them, without a graph.

    python benchmarks/gpu_figures.py --json FILE
    python benchmarks/gpu_figures.py --json FILE --rehearse  # tiny, on the host: not figures
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import dpo_kernels as dk  # noqa: E402
from dpo_kernels.backends import available, load  # noqa: E402
from dpo_kernels.transform import LogitTransform  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
IGNORE = -100
VOCABULARIES = {"Llama-2": 32000, "GPT-2": 50257, "Llama-3": 128256, "Qwen2.5": 151936,
                "Gemma 3": 262144}  # fmt: skip
ROWS = 4096
SMALL = ((4, 32, 32000), (8, 16, 128256), (16, 32, 50257))  # sequences, positions, vocabulary
# rows scored, hidden size, vocabulary
HEADS = {"Llama-3 8B": (4096, 4096, 128256), "Qwen2.5 0.5B": (4096, 896, 151936)}


def timed(call, repeats=20, before=lambda: None, with_host=False) -> dict[str, float]:
    """Milliseconds of `call` on the device; `before` runs outside the clock.

    The device is kept busy while the host enqueues the call, so that what is measured is the
    device's work alone; `with_host` lets it wait for the host, as in a program of small launches.
    """
    for _ in range(3 if GPU else 1):
        before()
        call()
    values = []
    for _ in range(repeats if GPU else 2):
        before()
        if GPU:
            torch.cuda.synchronize() if with_host else torch.cuda._sleep(1_000_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            values.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            values.append((time.perf_counter() - began) * 1e3)
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
    flush = torch.empty(256 << 20 if GPU else 1, dtype=torch.uint8, device=DEVICE)
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
            result = timed(call, before=flush.zero_)
            rate = passes * size / result["ms"] / 1e6
            found[f"{name} {what}"] = result | {
                "GB/s": rate, "percent of copy": 100 * rate / bandwidth
            }  # fmt: skip

    def eager():
        return logits[0].float().log_softmax(-1).gather(-1, targets[0, :, None])

    if 12 * size < free_memory():
        found["torch eager forward"] = timed(eager, before=flush.zero_)
    return found


def eager_loss(logits, labels, ref):
    labels = labels[:, 1:]
    scored = labels != IGNORE
    logps = logits[:, :-1].float().log_softmax(-1)
    tokens = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = ((tokens * scored).sum(-1) - ref).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def small_batch(R: int, T: int, V: int) -> dict[str, dict]:
    """Loss and gradient, as a program runs them: what launches cost counts."""
    logits = torch.randn(R, T, V, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(0, V, (R, T), device=DEVICE)
    ref = torch.randn(R, device=DEVICE)
    found = {}
    names = ["torch eager", *(n for n in ("triton", "cuda") if n in available())]
    for name in names:
        x = logits.clone().requires_grad_()

        def call(name=name, x=x):
            x.grad = None
            if name == "torch eager":
                loss = eager_loss(x, labels, ref)
            else:
                loss = dk.fused_dpo_loss(x, labels, ref_logps=ref, backend=name).loss
            loss.backward()

        found[name] = timed(call, repeats=50, with_host=True)
    for name in names[1:]:
        found[name]["x eager"] = found["torch eager"]["ms"] / found[name]["ms"]
    return found


def linear_head(rows: int, H: int, V: int) -> dict[str, dict]:
    """bf16, every row scored, against the bare products in the same dtype."""
    scored = rows // 8
    hidden = torch.randn(8, scored + 1, H, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(V, H, device=DEVICE, dtype=torch.bfloat16) * 0.02
    labels = torch.randint(0, V, (8, scored + 1), device=DEVICE)
    ref = torch.randn(8, device=DEVICE)
    flat = hidden[:, 1:].reshape(-1, H)

    def products(count):
        def call():
            z = flat @ weight.T
            if count > 1:
                z @ weight
            if count > 2:
                z.T @ flat

        return call

    def ours(backend, wants):
        leaves = [x.detach().requires_grad_(w) for x, w in zip((hidden, weight), wants,
                                                                strict=True)]  # fmt: skip

        def call():
            for x in leaves:
                x.grad = None
            out = dk.fused_linear_dpo_loss(*leaves, labels, ref_logps=ref, backend=backend)
            if out.loss.requires_grad:
                out.loss.backward()

        return call

    found = {}
    cases = {"trained": (3, (True, True)), "frozen": (2, (True, False)),
             "reference pass": (1, (False, False))}  # fmt: skip
    for case, (count, wants) in cases.items():
        floor = timed(products(count), repeats=10)
        found[f"{case}: {count} bare products"] = floor
        for backend in ("triton", "cuda"):
            if backend in available():
                result = timed(ours(backend, wants), repeats=10)
                found[f"{case}: {backend}"] = result | {"x floor": result["ms"] / floor["ms"]}
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
    for R, T, V in SMALL[: 1 if tiny else None]:
        T, V = (3, V // 128) if tiny else (T, V)
        keep("small batch", f"{R} x {T} x {V}", small_batch(R, T, V))
    for model, (rows, H, V) in list(HEADS.items())[: 1 if tiny else None]:
        rows, H, V = (16, 32, V // 256) if tiny else (rows, H, V)
        keep("linear head", f"{model} {rows} x {H} x {V}", linear_head(rows, H, V))


if __name__ == "__main__":
    main()
