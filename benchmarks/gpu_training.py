"""The figures of training on a GPU: the linear head, a whole step, layouts, and where time goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from gpu_timing import (
    DEVICE,
    GPU,
    IGNORE,
    Figures,
    Row,
    device_time,
    judged,
    peak_mib,
    reset_peak,
    wait,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dpo_kernels as dk
from dpo_kernels.backends import available, load
from dpo_kernels.inputs.transform import LogitTransform
from dpo_kernels.ops.products import multiply, products_of

HEAD_TARGET = 1.10  # times the bare products, at most
ODD_TARGET = 1.25  # the same, where the vocabulary has one token more than those products

# ---- the linear head ----------------------------------------------------------------------------


@dataclass
class Case:
    """A batch of hidden states, half of them scored, and a head."""

    hidden: Tensor  # [2 B, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [2 B, T]
    ref: Tensor  # [2 B]
    lengths: Tensor  # [2 B], on the host

    @staticmethod
    def of(dtype: torch.dtype, pairs: int, T: int, H: int, V: int) -> Case:
        torch.manual_seed(0)
        hidden = torch.randn(2 * pairs, T, H, device=DEVICE, dtype=dtype)
        weight = torch.randn(V, H, device=DEVICE).mul_(0.02).to(dtype)
        labels = torch.randint(0, V, (2 * pairs, T))
        labels[:, : T // 2] = IGNORE
        lengths = (labels[:, 1:] != IGNORE).sum(1)
        ref = torch.randn(2 * pairs, device=DEVICE) - 5.0 * T
        return Case(hidden, weight, labels.to(DEVICE), ref, lengths)

    def trained(self, budget: int | None = None, weight: bool = True) -> None:
        h = self.hidden.detach().requires_grad_()
        w = self.weight.detach().requires_grad_(weight)
        dk.fused_linear_dpo_loss(
            h,
            w,
            self.labels,
            ref_logps=self.ref,
            memory_budget=budget,
            scored_lengths=self.lengths,
        ).loss.backward()

    def frozen(self, budget: int | None = None) -> None:
        self.trained(budget, weight=False)

    def reference(self) -> None:
        with torch.no_grad():
            dk.linear_sequence_logps(
                self.hidden, self.weight, self.labels, scored_lengths=self.lengths
            )

    def rows(self) -> Tensor:
        """As many hidden states as are scored [N, H]."""
        return self.hidden.view(-1, self.hidden.shape[2])[: int(self.lengths.sum())].contiguous()

    def floors(self, repeats: int) -> dict[int, float]:
        """Milliseconds of one, two and three bare products of the scored rows."""
        rows, weight = self.rows(), self.weight
        z = torch.empty(len(rows), len(weight), device=DEVICE, dtype=rows.dtype).normal_()
        dh, dw = torch.empty_like(rows), torch.empty_like(weight)

        def products(count: int) -> None:
            torch.mm(rows, weight.T, out=z)
            if count > 1:
                torch.mm(z, weight, out=dh)
            if count > 2:
                torch.mm(z.T, rows, out=dw)

        return {n: device_time(partial(products, n), repeats) for n in (1, 2, 3)}


PRODUCTS = {"trained": 3, "frozen": 2, "reference": 1}


def head(tiny: bool) -> Figures:
    pairs, T, H, V = (2, 9, 16, 208) if tiny else (8, 1024, 4096, 128256)
    repeats = 1 if tiny else 5
    for dtype in (torch.bfloat16,) if tiny else (torch.bfloat16, torch.float16):
        case = Case.of(dtype, pairs, T, H, V)
        short = str(dtype).removeprefix("torch.")
        floors = case.floors(repeats)
        flop = 2 * int(case.lengths.sum()) * H * V
        for n, ms in floors.items():
            yield f"{short} bare products {n}", {"ms": ms, "TFLOP/s": n * flop / ms / 1e9}
        budgets = (None,) if tiny or dtype != torch.bfloat16 else (None, 512 << 20, 5 << 30)
        for what in ("trained", "frozen"):
            for budget in budgets:
                reset_peak()
                ms = device_time(partial(getattr(case, what), budget), repeats)
                of = ms / floors[PRODUCTS[what]]
                row: Row = {"ms": ms, "of the products": of, "MiB": peak_mib()}
                if budget is None:
                    row |= judged(of, HEAD_TARGET, least=False)
                size = "default budget" if budget is None else f"{budget >> 20} MiB"
                yield f"{short} {what}, {size}", row
        ms = device_time(case.reference, repeats)
        of = ms / floors[1]
        yield (
            f"{short} reference",
            {"ms": ms, "of the products": of, **judged(of, HEAD_TARGET, least=False)},
        )
        if dtype == torch.bfloat16:
            yield from _where_time_goes(case)
            del case
            yield from _one_token_more(pairs, T, H, V, floors, repeats)
            yield from _rounded_logits(H, V, tiny, repeats)


def _one_token_more(
    pairs: int, T: int, H: int, V: int, floors: dict[int, float], repeats: int
) -> Figures:
    """A vocabulary with a token added, beside the products of the one without."""
    case = Case.of(torch.bfloat16, pairs, T, H, V + 1)
    for what, n in PRODUCTS.items():
        ms = device_time(getattr(case, what), repeats)
        of = ms / floors[n]
        row: Row = {"ms": ms, "of the products": of, **judged(of, ODD_TARGET, least=False)}
        yield f"bfloat16 {what}, one token more", row
    rows = case.rows()
    z = torch.empty(len(rows), V + 1, device=DEVICE, dtype=torch.bfloat16)
    plain = device_time(lambda: torch.mm(rows, case.weight.T, out=z), repeats)
    row = {"ms": plain, "of the products": plain / floors[1]}
    yield "bfloat16 torch's product, one token more", row


def _rounded_logits(H: int, V: int, tiny: bool, repeats: int) -> Figures:
    """What logits rounded to bf16 by the product would save of a head's products and row kernels.

    Ours are written in fp32, 0.3 to 0.6 nat a sequence more exact; an option that rounds them would
    have to save a tenth.
    """
    kernels: ModuleType = load(available()[0])
    n, chunks = (16, 2) if tiny else (2048, 4)
    h = torch.randn(chunks, n, H, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(V, H, device=DEVICE).mul_(0.02).bfloat16()
    y, g = torch.randint(0, V, (chunks, 1, n), device=DEVICE), torch.randn(1, n, device=DEVICE)
    dz = torch.empty(1, n, V, device=DEVICE, dtype=torch.bfloat16)
    dh, dw = (torch.empty(size, H, device=DEVICE) for size in (n, V))
    args = (IGNORE, LogitTransform())

    def run(what: str, z: Tensor) -> None:
        for i in range(chunks):
            if z.dtype == torch.float32:
                multiply(h[i], w.T, z[0])
            else:
                torch.mm(h[i], w.T, out=z[0])
            lse = kernels.token_logps(z, y[i], *args, ())[1]
            if what == "reference":
                continue
            kernels.token_logps_backward(g, z, y[i], lse, *args, dz)
            multiply(dz[0], w, dh)
            if what == "trained":
                multiply(dz[0].T, h[i], dw, add=i > 0, scratch=64 << 20)

    if not products_of(w.device, w.dtype).narrow:
        return
    for what in PRODUCTS:
        ms = {}
        for dtype in (torch.float32, torch.bfloat16):
            z = torch.empty(1, n, V, device=DEVICE, dtype=dtype)
            ms[dtype] = device_time(partial(run, what, z), repeats)
        saved = 100 * (1 - ms[torch.bfloat16] / ms[torch.float32])
        yield (
            f"bfloat16 {what}, logits rounded",
            {"ms": ms[torch.bfloat16], "ms in fp32": ms[torch.float32], "percent saved": saved},
        )


# What a kernel's name says of it.
KINDS = {
    "products": ("nvjet", "gemm", "gemv", "cutlass", "splitK"),
    "row kernels": ("dpo::", "token_logps"),
}


def _where_time_goes(case: Case) -> Figures:
    """Milliseconds on the device by kind of kernel, of one call under torch's profiler."""
    if not GPU:
        return
    for what in PRODUCTS:
        getattr(case, what)()
        wait()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            getattr(case, what)()
            wait()
        times = dict.fromkeys((*KINDS, "the rest"), 0.0)
        launches = 0
        for event in found.key_averages():
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            kinds = (kind for kind, marks in KINDS.items() if any(m in event.key for m in marks))
            times[next(kinds, "the rest")] += event.self_device_time_total / 1e3
            launches += event.count
        yield f"bfloat16 {what}, ms by kind of kernel", {**times, "launches": launches}


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
        reset_peak()

        def run(loss=loss):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        ms = device_time(run, 1 if tiny else 6)
        row: Row = {"ms": ms, "tokens/s": 1e3 * tokens / ms, "peak MiB": peak_mib()}
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
            reset_peak()

            def run(layout=layout, batch=batch):
                optimizer.zero_grad()
                fused = {"layout": layout, "head_stats": False}
                plain.dpo_step(model, batch, reference_free=True, fused=fused).loss.backward()
                optimizer.step()

            ms = device_time(run, 1 if tiny else 6)
            padded = padded or ms
            row: Row = {"ms": ms, "tokens/s": 1e3 * tokens / ms, "peak MiB": peak_mib()}
            row["speed over padded"] = padded / ms
            if layout == "shared":
                row |= judged(padded / ms, target, least=True)
            yield f"prompt {share:.2f} of {mean} tokens, {layout}", row
