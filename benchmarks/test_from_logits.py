"""Log-probs and the DPO loss from logits: ours beside plain torch, the same data, one run.

Floors: forward one read of the logits; backward one read and one write. Each provider is checked
against float64 on a few rows before it is timed, and calls of the providers of a case follow each
other in one process. `inplace` overwrites the logits: they are restored outside the clock.
"""

import time

import pytest
import torch

import dpo_kernels as dk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"SmolLM2": (1024, 49152), "Llama-3": (512, 128256)}  # tokens, vocabulary
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAIRS = 4


def eager_logps(logits, labels):
    logp = logits[:, :-1].log_softmax(-1)
    return logp.gather(-1, labels[:, 1:].unsqueeze(-1)).squeeze(-1).sum(-1)


def eager_loss(logits, labels, ref):
    chosen, rejected = (eager_logps(logits, labels).float() - ref).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def our_loss(logits, labels, ref, inplace=False):
    return dk.fused_dpo_loss(logits, labels, ref_logps=ref, inplace=inplace).loss


FORWARD = {"torch eager": eager_logps, "dpo_kernels": dk.sequence_logps}
BACKWARD = {
    "torch eager": eager_loss,
    "dpo_kernels": our_loss,
    "dpo_kernels inplace": lambda *a: our_loss(*a, inplace=True),
}


@pytest.fixture(scope="module", params=[(s, d) for s in SHAPES for d in DTYPES],
                ids=lambda p: "-".join(p))  # fmt: skip
def case(request):
    shape, dtype = request.param
    N, V = SHAPES[shape]
    torch.manual_seed(0)
    logits = torch.randn(2 * PAIRS, N // (2 * PAIRS), V, device=DEVICE).to(DTYPES[dtype])
    labels = torch.randint(0, V, logits.shape[:2], device=DEVICE)
    ref = dk.sequence_logps(logits, labels) + torch.randn(2 * PAIRS, device=DEVICE)
    yield f"{shape} {N} x {V} {dtype}", logits, labels, ref
    del logits


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(benchmark, record, name, provider, setup, call, rounds=5):
    seconds = []

    def timed(*args):
        began = time.perf_counter()
        call(*args)
        synchronize()
        seconds.append(time.perf_counter() - began)

    benchmark.pedantic(timed, setup=setup, rounds=rounds, warmup_rounds=1, iterations=1)
    record(name, provider, seconds[1:])


@pytest.mark.parametrize("provider", FORWARD)
def test_forward(benchmark, record, case, provider):
    name, logits, labels, _ = case
    few = logits[:1, :4], labels[:1, :4]
    exact = eager_logps(few[0].double(), few[1])
    rounding = 1e-5 if provider.startswith("dpo") or logits.dtype == torch.float32 else 0.5
    assert (FORWARD[provider](*few) - exact).abs().max() < rounding
    with torch.no_grad():
        measure(benchmark, record, f"forward   {name}", provider, None,
                lambda: FORWARD[provider](logits, labels))  # fmt: skip


@pytest.mark.parametrize("provider", BACKWARD)
def test_forward_backward(benchmark, record, case, provider):
    name, logits, labels, ref = case
    keep = logits.clone() if "inplace" in provider else None

    def setup():
        if keep is not None:
            logits.copy_(keep)
        x = logits.detach().requires_grad_()
        return (x.view_as(x),), {}

    measure(benchmark, record, f"fwd + bwd {name}", provider, setup,
            lambda x: BACKWARD[provider](x, labels, ref).backward())  # fmt: skip
    if keep is not None:
        logits.copy_(keep)
