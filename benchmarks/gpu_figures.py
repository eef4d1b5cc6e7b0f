"""Figures of a GPU run, each beside its floor and its target: a program that prints JSON.

    python benchmarks/gpu_figures.py --json FILE [--section NAME]   # one section, or all
    python benchmarks/gpu_figures.py --json FILE --rehearse  # tiny, on the host: not figures

Sections (`tools/gpu_check.py` runs each in a process of its own, so that an illegal address costs
one of them):

    kernels    from logits, the kernels alone: plain, statistics, softcap, KL; bf16, fp32 and fp32
               with a bf16 gradient; half the rows unscored; rows that begin anywhere. Percent of
               the bandwidth of a device-to-device copy that moves as many bytes as must move
    rows       1 to 263 rows, beside plain torch
    host       microseconds of the host for a small batch, beside plain torch
    head       the linear head beside its bare matrix products: budgets, dtypes, what is trained;
               a vocabulary with a token added; where its time goes; what rounded logits would save
    step       a whole training step of a Llama of 1.2 billion random weights
    layouts    the same step over ragged pairs in padded, packed and shared rows
    profile    what the hardware's counters say of each kernel (Nsight Compute, where installed)
    peers      the quick cases of `dpo-kernels bench` with every peer that is installed

A figure with a target says whether it was met. Times are medians of device events; those of the
head and of the step are behind a busy device, as in training, where the host runs ahead.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from gpu_profile import profile
from gpu_timing import DEVICE, GPU, IGNORE, Figures, Row, copy_bandwidth, host_time, judged, timed
from gpu_training import head, layouts, step
from torch import Tensor

import dpo_kernels as dk
from dpo_kernels.backends import available, load
from dpo_kernels.bench import cases, measure, results
from dpo_kernels.inputs.transform import LogitTransform
from dpo_kernels.ops.token_logps import STATS

VOCABULARIES = {
    "Llama-2": 32000,
    "GPT-2": 50257,
    "Llama-3": 128256,
    "Qwen2.5": 151936,
    "Gemma 3": 262144,
}
ROWS = 4096
PLAIN, SOFTCAP = LogitTransform(), LogitTransform(softcap=30.0)
# Percent of the copy bandwidth, at least, of the backend that `backend=None` takes.
TARGETS = {"forward": 92, "backward in place": 92, "statistics": 70, "softcap": 60}
HOST_TARGET = 1.25  # times plain torch, at most


# ---- from logits --------------------------------------------------------------------------------


def kernels(tiny: bool) -> Figures:
    large = 1e6 if tiny else 8e9
    yield "copy of 8 GB", {"GB/s": copy_bandwidth(large)}
    for model, V in list(VOCABULARIES.items())[: 1 if tiny else None]:
        rows, V = (3, V // 64) if tiny else (ROWS, V)
        yield from _kernels_of(f"{model} {rows} x {V}", rows, V, tiny)


@dataclass
class Batch:
    """Logits that lie aligned, and the same rows beginning one element later."""

    aligned: Tensor  # [1, N, V] bf16
    shifted: Tensor
    ref: Tensor
    targets: Tensor  # [1, N]
    grad: Tensor  # [1, N]

    @staticmethod
    def of(rows: int, V: int) -> Batch:
        wide = torch.randn(1, rows, V + 1, device=DEVICE, dtype=torch.bfloat16)
        return Batch(
            wide.view(-1)[: rows * V].view(1, rows, V),
            wide[..., 1:],
            torch.randn(1, rows, V, device=DEVICE, dtype=torch.bfloat16),
            torch.randint(0, V, (1, rows), device=DEVICE),
            torch.randn(1, rows, device=DEVICE),
        )


def _kernels_of(name: str, rows: int, V: int, tiny: bool) -> Figures:
    bandwidth = functools.cache(copy_bandwidth)
    batch = Batch.of(rows, V)
    backends = [b for b in ("cuda", "triton") if b in available()]
    for backend in backends:
        for what, (size, call) in _calls(load(backend), batch, tiny).items():
            ms = timed(call)
            percent = 100 * size / ms / 1e6 / bandwidth(size)
            row: Row = {"ms": ms, "percent of copy": percent}
            target = TARGETS.get(what.split(",")[0])
            if target and backend == backends[0]:
                row |= judged(percent, target, least=True)
            yield f"{name} {backend} {what}", row


def _calls(k: ModuleType, b: Batch, tiny: bool) -> dict[str, tuple[float, Callable[[], object]]]:
    """What each call is, the bytes it must move, and the call."""
    x, y, size = b.aligned, b.targets, 2 * b.aligned.numel()
    half = y.masked_fill(torch.arange(y.shape[1], device=DEVICE) % 2 == 0, IGNORE)

    def forward(x, y=y, transform=PLAIN, stats=()):
        return k.token_logps(x, y, IGNORE, transform, stats)

    def backward(x, lse, y=y, transform=PLAIN, out=None):
        k.token_logps_backward(b.grad, x, y, lse, IGNORE, transform, x if out is None else out)

    lse, work = forward(x)[1], x.clone()
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "forward": (size, lambda: forward(x)),
        "forward, rows begin anywhere": (size, lambda: forward(b.shifted)),
        "forward, half unscored": (size / 2, lambda: forward(x, half)),
        "statistics": (size, lambda: forward(x, stats=STATS)),
        "softcap": (size, lambda: forward(x, transform=SOFTCAP)),
        "backward in place": (2 * size, lambda: backward(work, lse)),
        "backward in place, softcap": (2 * size, lambda: backward(work, lse, transform=SOFTCAP)),
        # Unscored rows are zeroed without being read.
        "backward in place, half unscored": (1.5 * size, lambda: backward(work, lse, half)),
    }
    if k.__name__.endswith("triton"):
        kl = k.token_kl(x, b.ref, y, IGNORE, PLAIN)
        args = (b.grad, b.grad, work, b.ref, y, kl[1], kl[3], IGNORE, PLAIN, work)
        calls["KL"] = (2 * size, lambda: k.token_kl(x, b.ref, y, IGNORE, PLAIN))
        calls["KL backward"] = (3 * size, lambda: k.token_kl_backward(*args))
    if tiny or x.shape[2] == VOCABULARIES["Llama-3"]:
        wide = torch.randn(x.shape, device=DEVICE)
        wide_lse = forward(wide)[1]
        calls |= {
            "forward, fp32": (2 * size, lambda: forward(wide)),
            "backward, fp32 to bf16": (3 * size, lambda: backward(wide, wide_lse, out=work)),
            "backward in place, fp32": (4 * size, lambda: backward(wide, wide_lse)),
        }
    return calls


def rows(tiny: bool) -> Figures:
    """Few rows: the forward beside log_softmax and gather."""
    V = 331 if tiny else 128256
    for n in (1, 5) if tiny else (1, 8, 64, 131, 132, 263):
        logits = torch.randn(1, n, V, device=DEVICE, dtype=torch.bfloat16)
        targets = torch.randint(0, V, (1, n), device=DEVICE)

        def eager(x=logits, y=targets):
            return x.float().log_softmax(-1).gather(-1, y[..., None])

        plain = timed(eager)
        for backend in (b for b in ("cuda", "triton") if b in available()):
            k = load(backend)
            ms = timed(lambda k=k, x=logits, y=targets: k.token_logps(x, y, IGNORE, PLAIN, ()))
            yield (
                f"{backend} {n} rows",
                {
                    "ms": ms,
                    "plain torch ms": plain,
                    **judged(ms / plain, 1.0, least=False),
                },
            )


# ---- the host -----------------------------------------------------------------------------------


def host(tiny: bool) -> Figures:
    R, T, V, H = 4, 8, 64, 32
    labels = torch.randint(0, V, (R, T), device=DEVICE)
    ref = torch.randn(R, device=DEVICE)
    logits = torch.randn(R, T, V, device=DEVICE, requires_grad=True)
    hidden = torch.randn(R, T, H, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    logps = torch.randn(R, device=DEVICE, requires_grad=True)
    scored = torch.full((R,), T - 1)

    def of_sums(sums):
        ratio = sums - ref
        u, v = ratio[: R // 2], ratio[R // 2 :]
        loss = -torch.nn.functional.logsigmoid(0.1 * (u - v)).mean()
        with torch.no_grad():
            kept = (
                sums[: R // 2],
                sums[R // 2 :],
                0.1 * u,
                0.1 * v,
                0.1 * (u - v),
                (u > v).float(),
            )
        return loss, kept

    def plain(x):
        y = labels[:, 1:]
        picked = x[:, :-1].log_softmax(-1).gather(-1, y[..., None])[..., 0]
        return of_sums((picked * (y != IGNORE)).sum(-1))

    def both(loss):
        loss.backward()

    ours = {
        "from logits": lambda: both(dk.fused_dpo_loss(logits, labels, ref_logps=ref).loss),
        "from hidden states": lambda: both(
            dk.fused_linear_dpo_loss(
                hidden, weight, labels, ref_logps=ref, scored_lengths=scored
            ).loss
        ),
        "from log-probs": lambda: both(
            dk.preference_loss(logps[:2], logps[2:], ref[:2], ref[2:]).loss
        ),
    }
    theirs = {
        "from logits": lambda: both(plain(logits)[0]),
        "from hidden states": lambda: both(plain(hidden @ weight.T)[0]),
        "from log-probs": lambda: both(of_sums(logps)[0]),
    }
    for name, call in ours.items():
        us, eager = (host_time(c, 3 if tiny else 300) for c in (call, theirs[name]))
        target = 2.0 if name == "from log-probs" else HOST_TARGET
        yield name, {"us": us, "plain torch us": eager, **judged(us / eager, target, least=False)}


# ---- peers --------------------------------------------------------------------------------------


def peers(tiny: bool) -> Figures:
    for case in _tiny_cases() if tiny else cases.quick(DEVICE):
        # Without what compiles for half a minute: the time is short.
        for m in measure.measure(case, DEVICE, 8 if GPU else 1, without=("torch.compile",)):
            yield f"{case.name}: {m.provider}", dict(results.as_row(m))


def _tiny_cases() -> list[cases.Case]:
    cases.MODELS["tiny"] = cases.Model(64, 211)
    suites = ("small batch", "linear trained", "linear frozen", "linear reference")
    return [cases.Case(suite, "tiny", "bf16", 16, 0.6) for suite in suites]


SECTIONS: dict[str, Callable[[bool], Figures]] = {
    "kernels": kernels,
    "rows": rows,
    "host": host,
    "head": head,
    "step": step,
    "layouts": layouts,
    "profile": profile,
    "peers": peers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--section", choices=SECTIONS, help="one; else all, one after the other")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the host")
    options = parser.parse_args()
    if options.rehearse and not GPU:
        from dpo_kernels.backends import cuda
        from tests.cuda_on_host import build

        cuda.on_host = build.module()
    torch.manual_seed(0)
    figures: dict[str, dict[str, Row]] = {}
    for name in [options.section] if options.section else SECTIONS:
        for case, row in SECTIONS[name](options.rehearse):
            figures.setdefault(name, {})[case] = row
            # After every figure: what a time limit cuts off does not take the rest with it.
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
            print(name, case, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
