"""What the checks of the sharded head (`parallel_ranks.py`) share; each rank has a copy."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from linear_cases import B, H, V, labels_of, tensors
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_kernels as dk

CHECKS = {}
STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
SIZES = {2: (50, 33), 4: (40, 1, 0, 42)}  # uneven, and none at all


def check(function):
    CHECKS[function.__name__] = function
    return function


@functools.cache
def shards(V=V):
    return new_shards(V)


def new_shards(V=V):
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = SIZES[world] if sum(SIZES[world]) == V else [V // world] * world
    return dk.parallel.vocab_parallel(dist.group.WORLD, sizes[rank], vocab=V)


def rows(s, x):
    return None if x is None else x.detach()[s.start : s.stop].clone()


def leaf(x, train=True):
    return None if x is None else x.detach().clone().requires_grad_(train)


def near(name, got, expected, tolerance, scale=None):
    assert got.shape == expected.shape, name
    assert torch.equal(got.isfinite(), expected.isfinite()), f"{name}: {got}, not {expected}"
    good = expected.isfinite()
    if good.any():
        got, expected = got[good].double(), expected[good].double()
        scale = expected.abs().max() if scale is None else scale.double()
        error = float((got - expected).abs().max() / scale.clamp(min=1e-3))
        assert error <= tolerance, f"{name}: off by {error:.1e}"


def compare(
    dtype,
    *,
    tolerance=None,
    train=("hidden", "weight", "bias"),
    lora=False,
    ref="hidden",
    s=None,
    call=None,
    **options,
):
    """Loss, fields, statistics and gradients of a sharded head against the whole one."""
    s, call = s or shards(), call or {}
    tolerance = tolerance or (1e-9 if dtype == torch.float64 else 1e-5)
    torch.manual_seed(1)
    hidden, weight, bias, ref_hidden, ref_weight = tensors(dtype, V=s.vocab)
    labels = labels_of(s.vocab)
    down, up = (torch.randn(3, H) * 0.3).to(dtype), (torch.randn(s.vocab, 3) * 0.3).to(dtype)
    outputs, grads = [], []
    for whole in (True, False):
        own = (lambda x: x) if whole else (lambda x: rows(s, x))
        x = {
            "hidden": leaf(hidden, "hidden" in train),
            "weight": leaf(own(weight), "weight" in train),
            "bias": leaf(own(bias), "bias" in train),
        }
        if lora:
            x |= {"down": leaf(down), "up": leaf(own(up))}
        given = {"bias": x["bias"], **options, **call}
        if lora:
            given["lora"] = (x["down"], x["up"], 0.7)
        if ref == "hidden":
            given |= {"ref_hidden": ref_hidden, "ref_weight": own(ref_weight)}
        elif ref == "logps":
            given["ref_logps"] = torch.linspace(-3, -1, 2 * B, dtype=dtype)
        if not whole:
            given["vocab_group"] = s
        out = dk.fused_linear_dpo_loss(x["hidden"], x["weight"], labels, **given)
        outputs.append(out)
        if out.loss.requires_grad:
            out.loss.sum().backward()
        grads.append({name: t.grad for name, t in x.items()})
    expected, got = outputs
    assert got.strategy == expected.strategy, (got.strategy, expected.strategy)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype
        near(got._fields[i] if hasattr(got, "_fields") else f"field {i}", a, b, tolerance)
    for name, value in expected.stats.items():
        near(name, got.stats[name], value, tolerance)
    for name, g in grads[0].items():
        assert (g is None) == (grads[1][name] is None), name
        if g is not None:
            whole = name in ("hidden", "down")
            near(name, grads[1][name], g if whole else rows(s, g), tolerance, g.abs().max())
    return got


def raises(text, *arguments, **options):
    try:
        dk.fused_linear_dpo_loss(*arguments, **options)
    except (ValueError, TypeError) as error:
        assert text in str(error), str(error)
        return
    raise AssertionError(f"nothing was raised: {text}")


class counted:
    """Bytes of each collective, in order."""

    def __enter__(self):
        self.calls, self.whole = [], {}
        for name in ("all_reduce", "all_gather_object", "all_gather", "broadcast"):
            self.whole[name] = getattr(dist, name)
            setattr(dist, name, self.wrapped(name))
        return self.calls

    def wrapped(self, name):
        def call(x, *arguments, **options):
            assert name == "all_reduce", name
            self.calls.append(x.numel() * x.element_size())
            return self.whole[name](x, *arguments, **options)

        return call

    def __exit__(self, *_):
        for name, function in self.whole.items():
            setattr(dist, name, function)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for x in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // 4)
        return out


def status(name):
    """Bytes that the kernel tells of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)
