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
    head       the linear head beside its bare matrix products: budgets, dtypes, what is trained
    step       a whole training step of a Llama of 1.2 billion random weights
    layouts    the same step over ragged pairs in padded, packed and shared rows
    peers      the quick cases of `dpo-kernels bench` with every peer that is installed

A figure with a target says whether it was met. Times are medians of device events; those of the
head and of the step are behind a busy device, as in training, where the host runs ahead.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import dpo_kernels as dk  # noqa: E402
from dpo_kernels.backends import available, load  # noqa: E402
from dpo_kernels.bench import cases, measure, results  # noqa: E402
from dpo_kernels.inputs.transform import LogitTransform  # noqa: E402
from dpo_kernels.ops.token_logps import STATS  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
IGNORE = -100
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
HEAD_TARGET = 1.10  # times the bare products, at most
HOST_TARGET = 1.25  # times plain torch, at most
Row = dict[str, object]
Figures = Iterator[tuple[str, Row]]


def timed(call: Callable[[], object], repeats: int = 15) -> float:
    """Median milliseconds of `call` on the device, behind a flushed cache."""
    for _ in range(3 if GPU else 1):
        call()
    return statistics.median(
        1e3 * measure.clock(call, lambda: None, DEVICE, host_bound=False)
        for _ in range(repeats if GPU else 2)
    )


def copy_bandwidth(size: float) -> float:
    """GB/s of a device-to-device copy that moves `size` bytes, read plus written."""
    source = torch.empty(max(1, int(size) // 8), dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return size / timed(lambda: target.copy_(source)) / 1e6


def judged(value: float, target: float, *, least: bool) -> Row:
    return {"target": target, "met": value >= target if least else value <= target}


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


def host_time(call: Callable[[], object], repeats: int) -> float:
    """Median microseconds until `call` has been enqueued, on an idle device."""
    values = []
    for _ in range(repeats + 20):
        _wait()
        began = time.perf_counter()
        call()
        values.append(1e6 * (time.perf_counter() - began))
    return statistics.median(values[20:])


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


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


# ---- the linear head ----------------------------------------------------------------------------


def device_time(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds between events around `call`, enqueued behind a busy device."""
    values = []
    for _ in range(repeats + 2):
        if not GPU:
            began = time.perf_counter()
            call()
            values.append(1e3 * (time.perf_counter() - began))
            continue
        _wait()
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms, for the host to run ahead
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        _wait()
        values.append(start.elapsed_time(end))
    return statistics.median(values[2:])


def head(tiny: bool) -> Figures:
    dtypes = (torch.bfloat16,) if tiny else (torch.bfloat16, torch.float16)
    pairs, T, H, V = (2, 9, 16, 211) if tiny else (8, 1024, 4096, 128256)
    for dtype in dtypes:
        torch.manual_seed(0)
        hidden = torch.randn(2 * pairs, T, H, device=DEVICE, dtype=dtype)
        weight = torch.randn(V, H, device=DEVICE).mul_(0.02).to(dtype)
        labels = torch.randint(0, V, (2 * pairs, T))
        labels[:, : T // 2] = IGNORE
        lengths = (labels[:, 1:] != IGNORE).sum(1)
        labels = labels.to(DEVICE)
        N = int(lengths.sum())
        ref = torch.randn(2 * pairs, device=DEVICE) - 5.0 * T
        rows = hidden.view(-1, H)[:N].contiguous()
        z = torch.empty(N, V, device=DEVICE, dtype=dtype).normal_()
        dh, dw = torch.empty_like(rows), torch.empty_like(weight)

        def products(count, z=z, rows=rows, weight=weight, dh=dh, dw=dw):
            torch.mm(rows, weight.T, out=z)
            if count > 1:
                torch.mm(z, weight, out=dh)
            if count > 2:
                torch.mm(z.T, rows, out=dw)

        repeats = 1 if tiny else 5
        floors = {n: device_time(lambda n=n: products(n), repeats) for n in (1, 2, 3)}
        del z, dh, dw
        short = str(dtype).removeprefix("torch.")
        for n, ms in floors.items():
            rate = 2 * n * N * H * V / ms / 1e9
            yield f"{short} bare products {n}", {"ms": ms, "TFLOP/s": rate}

        def call(
            trained,
            budget=None,
            hidden=hidden,
            weight=weight,
            labels=labels,
            ref=ref,
            lengths=lengths,
        ):
            h = hidden.detach().requires_grad_()
            w = weight.detach().requires_grad_(trained)
            dk.fused_linear_dpo_loss(
                h, w, labels, ref_logps=ref, memory_budget=budget, scored_lengths=lengths
            ).loss.backward()

        def reference(hidden=hidden, weight=weight, labels=labels):
            with torch.no_grad():
                dk.linear_sequence_logps(hidden, weight, labels)

        budgets = (None,) if tiny or dtype != torch.bfloat16 else (None, 512 << 20, 5 << 30)
        for trained, count in ((True, 3), (False, 2)):
            for budget in budgets:
                _reset_peak()
                ms = device_time(lambda t=trained, b=budget: call(t, b), repeats)
                name = f"{short} {'trained' if trained else 'frozen'}, " + (
                    "default budget" if budget is None else f"{budget >> 20} MiB"
                )
                row: Row = {"ms": ms, "of the products": ms / floors[count], "MiB": _peak_mib()}
                if budget is None:
                    row |= judged(ms / floors[count], HEAD_TARGET, least=False)
                yield name, row
        ms = device_time(reference, repeats)
        yield (
            f"{short} reference",
            {
                "ms": ms,
                "of the products": ms / floors[1],
                **judged(ms / floors[1], HEAD_TARGET, least=False),
            },
        )
        del hidden, weight, rows


def _reset_peak() -> None:
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_mib() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if GPU else 0.0


# ---- a whole step -------------------------------------------------------------------------------


def _llama(tiny: bool) -> tuple[Any, torch.optim.Optimizer, int]:
    """A Llama of random bf16 weights, its optimizer, its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = (64, 128, 2, 2, 331) if tiny else (2048, 8192, 16, 32, 128256)
    H, inner, layers, heads, V = shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).bfloat16()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=GPU), V


def step(tiny: bool) -> Figures:
    """Forward, loss, backward and AdamW of a random bf16 Llama; the reference is given."""
    model, optimizer, V = _llama(tiny)
    R, T = (4, 12) if tiny else (8, 1024)
    ids = torch.randint(0, V, (R, T), device=DEVICE)
    labels = ids.clone()
    labels[:, : T // 2] = IGNORE
    scored = (labels[:, 1:] != IGNORE).sum(1).cpu()
    ref = torch.randn(R, device=DEVICE) - 11.0 * (T // 2)

    def plain():
        logits = model(input_ids=ids).logits[:, :-1]
        y = labels[:, 1:]
        mask = y != IGNORE
        logps = logits.float().log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
        ratio = (logps * mask).sum(-1) - ref
        return -torch.nn.functional.logsigmoid(0.1 * (ratio[: R // 2] - ratio[R // 2 :])).mean()

    def from_logits():
        logits = model(input_ids=ids).logits
        return dk.fused_dpo_loss(logits, labels, ref_logps=ref, inplace=True).loss

    def linear():
        hidden = model.model(input_ids=ids).last_hidden_state
        return dk.fused_linear_dpo_loss(
            hidden, model.lm_head.weight, labels, ref_logps=ref, scored_lengths=scored
        ).loss

    tokens, eager = R * T, 0.0
    for name, loss in (("plain torch", plain), ("from logits", from_logits), ("linear", linear)):
        optimizer.zero_grad()
        _reset_peak()

        def run(loss=loss):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        ms = device_time(run, 1 if tiny else 6)
        row: Row = {"ms": ms, "tokens/s": 1e3 * tokens / ms, "peak MiB": _peak_mib()}
        eager = eager or ms
        if name != "plain torch":
            row |= {"of plain torch": ms / eager} | judged(ms / eager, 1.0, least=False)
        yield name, row


# Prompt's share of the tokens -> speed of shared rows over padded ones, at least.
LAYOUT_TARGETS = {0.25: 1.0, 0.5: 1.5, 0.75: 2.0}


def layouts(tiny: bool) -> Figures:
    """Padded, packed and shared rows of the same ragged pairs, through `plain.dpo_step`."""
    from dpo_kernels.integrations import plain

    model, optimizer, V = _llama(tiny)
    plain.attach(model)
    draw = torch.Generator().manual_seed(0)
    mean, pairs = (24, 2) if tiny else (1024, 8)
    for share, target in LAYOUT_TARGETS.items():
        examples = []
        for _ in range(pairs):
            sizes = [
                int(size * (0.5 + float(torch.rand((), generator=draw)))) + 1
                for size in (mean * share, mean * (1 - share), mean * (1 - share))
            ]
            three = [torch.randint(V, (n,), generator=draw).tolist() for n in sizes]
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            examples.append(dict(zip(names, three, strict=True)))
        host = plain.PreferenceCollator(0)(examples)
        batch = {k: v if k == "labels" else v.to(DEVICE) for k, v in host.items()}
        tokens, padded = int(host["attention_mask"].sum()), 0.0
        for layout in ("padded", "packed", "shared"):
            optimizer.zero_grad()
            _reset_peak()

            def run(layout=layout, batch=batch):
                optimizer.zero_grad()
                fused = {"layout": layout, "head_stats": False}
                plain.dpo_step(model, batch, reference_free=True, fused=fused).loss.backward()
                optimizer.step()

            ms = device_time(run, 1 if tiny else 6)
            padded = padded or ms
            row: Row = {"ms": ms, "tokens/s": 1e3 * tokens / ms, "peak MiB": _peak_mib()}
            row["speed over padded"] = padded / ms
            if layout == "shared":
                row |= judged(padded / ms, target, least=True)
            yield f"prompt {share:.2f} of {mean} tokens, {layout}", row


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
