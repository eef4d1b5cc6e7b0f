"""The linear head: ours beside its floor (the bare matrix products), plain torch, TRL and Liger.

Four sequences of 256 tokens, half of them scored, as SmolLM2's head sees them. The floor of a
trained head is three products over the scored rows, of a frozen one two, of a reference pass one.
The providers of a case take turns, so that other work on the machine meets them all alike; each is
checked against the others before it is timed. TRL 1.16 projects every row on a CPU and the scored
ones on a GPU: its kernel is timed on both. Peers that are absent are skipped with their pip name.
"""

import statistics
import time

import pytest
import torch

import dpo_kernels as dk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, V = 2, 256, 576, 49152
ROUNDS = 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MISSING = {}


def peers():
    """Providers by name; MISSING says what to install for the others."""
    found = {}
    try:
        from trl.kernels import ChunkedLogProbFunction

        def trl(hidden, weight, labels, ref, scored_only):
            flat, y = hidden[:, :-1].reshape(-1, H), labels[:, 1:].reshape(-1)
            mask = y != -100
            rows = (flat[mask], weight, None, y[mask]) if scored_only else (
                flat, weight, None, y.clamp(min=0))  # fmt: skip
            logp = ChunkedLogProbFunction.apply(*rows, 1.0, 32768, None, 1.0, ())[0]
            tokens = logp.new_zeros(mask.shape).masked_scatter(mask, logp if scored_only else
                                                               logp[mask])  # fmt: skip
            chosen, rejected = (tokens.view(2 * B, -1).sum(-1) - ref).chunk(2)
            return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

        found["TRL 1.16"] = lambda *a: trl(*a, scored_only=DEVICE == "cuda")
        found["TRL 1.16, scored rows"] = lambda *a: trl(*a, scored_only=True)
    except ImportError:
        MISSING["TRL"] = "pip install trl==1.16.0"
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss = LigerFusedLinearDPOLoss(use_ref_model=False, compiled=DEVICE == "cuda")

        def liger(hidden, weight, labels, ref):
            # The same products; its reference would be projected beside, so it is left out and the
            # loss is that without a reference: the time is a lower bound.
            return loss(weight, hidden[:, :-1], labels[:, 1:])[0]

        found["Liger DPO"] = liger
    except ImportError:
        MISSING["Liger"] = "pip install liger-kernel==0.8.5"
    return found


def eager(hidden, weight, labels, ref):
    logp = (hidden[:, :-1] @ weight.T).float().log_softmax(-1)
    y = labels[:, 1:]
    tokens = logp.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (y != -100)
    chosen, rejected = (tokens.sum(-1) - ref).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def ours(hidden, weight, labels, ref, **options):
    return dk.fused_linear_dpo_loss(hidden, weight, labels, ref_logps=ref, **options).loss


def products(count):
    def run(hidden, weight, labels, ref):
        rows = hidden[:, :-1][labels[:, 1:] != -100].detach()
        weight = weight.detach()
        z = rows @ weight.T
        return [z, z @ weight if count > 1 else None, z.T @ rows if count > 2 else None]

    return run


@pytest.fixture(scope="module", params=DTYPES)
def batch(request):
    torch.manual_seed(0)
    dtype = DTYPES[request.param]
    hidden = torch.randn(2 * B, T, H, device=DEVICE).to(dtype)
    weight = (torch.randn(V, H, device=DEVICE) * 0.05).to(dtype)
    labels = torch.randint(0, V, (2 * B, T), device=DEVICE)
    labels[:, : T // 2] = -100
    return request.param, hidden, weight, labels, dk.linear_sequence_logps(hidden, weight, labels)


def take_turns(providers, arguments, backward):
    """Seconds of each provider, in turns, after one round that is not counted."""
    seconds = {name: [] for name in providers}
    for turn in range(ROUNDS + 1):
        for name, call in providers.items():
            leaves = [x.detach().requires_grad_(want) for x, want in zip(
                arguments[:2], backward, strict=True)]  # fmt: skip
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            out = call(*leaves, *arguments[2:])
            if isinstance(out, torch.Tensor) and out.requires_grad:
                out.backward()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
            del out, leaves
    return seconds


CASES = {
    "trained head": ((True, True), 3),
    "frozen head": ((True, False), 2),
    "reference pass": ((False, False), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_linear_head(benchmark, record, batch, case):
    dtype, *arguments = batch
    backward, count = CASES[case]
    floor = f"{count} bare products"
    providers = {floor: products(count), "dpo_kernels": ours, "torch eager": eager, **peers()}
    if case == "trained head":
        for size in (64, 1024):
            providers[f"dpo_kernels {size} MB"] = (
                lambda *a, size=size: ours(*a, memory_budget=size << 20)
            )  # fmt: skip
    expected = ours(*arguments).item()
    for name, call in providers.items():
        if name not in (floor, "Liger DPO"):
            rounding = 1e-4 if dtype == "fp32" or name.startswith("dpo") else 0.3
            assert abs(call(*arguments).item() - expected) < rounding, name
    seconds = take_turns(providers, arguments, backward)
    for name, values in seconds.items():
        record(f"linear {case} {dtype}", name, values)
    benchmark.extra_info["seconds"] = {k: statistics.median(v) for k, v in seconds.items()}
    benchmark.extra_info["not installed"] = MISSING
    benchmark.pedantic(lambda: ours(*arguments), rounds=1)
    if MISSING and case == "trained head":
        pytest.skip(f"timed without {', '.join(MISSING)}: {'; '.join(MISSING.values())}")
