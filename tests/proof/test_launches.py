"""Every launch of the GPU kernels as the host makes it: grid, threads, shared memory, constexprs.

On meta tensors of real shapes, so that nothing runs. `launches.json` holds what they were; a
difference is shown, and where it is meant the file is written anew:

    python tests/proof/test_launches.py

Shared memory of the Triton kernels is the compiler's: `test_triton_aot.py` compares it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")

from dpo_kernels.backends import cuda
from dpo_kernels.backends.triton import launch as launches
from dpo_kernels.inputs.transform import LogitTransform

RECORDED = Path(__file__).with_name("launches.json")
sys.path.insert(0, str(Path(__file__).parents[1]))  # cuda_on_host, where this is a program
SHARED = "triton shared memory, sm_90"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PLAIN, CAPPED = LogitTransform(), LogitTransform(softcap=30.0)
STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
TRITON = {
    name: importlib.import_module(f"dpo_kernels.backends.triton.{name}")
    for name in ("token_logps", "token_kl", "sequence_sum", "pair_loss", "scaled_copy")
}


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def logits(rows: int, V: int, dtype: torch.dtype, pitch: int = 0) -> torch.Tensor:
    return empty(1, rows, pitch or V, dtype=dtype)[..., :V]


def calls(backend) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is launched: from logits of models and tests, and from the linear head's chunks."""
    for rows, V, dtype, pitch in (
        (8192, 128256, BF16, 0),
        (8192, 152064, FP32, 0),
        (2048, 50257, FP16, 0),
        (2665, 128256, FP32, 128256),
        (1000, 50257, FP32, 50304),
        (16, 256000, BF16, 0),
    ):
        x = logits(rows, V, dtype, pitch)
        y, lse, g = empty(1, rows, dtype=torch.int64), empty(1, rows, dtype=FP64), empty(1, rows)
        label = f"{rows} x {V} {str(dtype)[6:]}{f' of {pitch}' if pitch else ''}"
        forward = functools.partial(backend.token_logps, x, y, -100)
        yield f"forward {label}", functools.partial(forward, PLAIN, ())
        yield f"forward softcap {label}", functools.partial(forward, CAPPED, ())
        yield f"forward stats {label}", functools.partial(forward, PLAIN, STATS)
        for into in (dtype,) if dtype != FP32 else (FP32, BF16):
            out = x if into == dtype else logits(rows, V, into, pitch)
            for name, transform in (("", PLAIN), (" softcap", CAPPED)):
                yield (
                    f"backward{name} {label} into {str(into)[6:]}",
                    functools.partial(
                        backend.token_logps_backward, g, x, y, lse, -100, transform, out
                    ),
                )
        if hasattr(backend, "token_kl"):
            r = logits(rows, V, dtype, pitch)
            yield f"kl {label}", functools.partial(backend.token_kl, x, r, y, -100, PLAIN)
            yield (
                f"kl backward {label}",
                functools.partial(
                    backend.token_kl_backward, g, g, x, r, y, lse, lse, -100, PLAIN, x
                ),
            )
    for S, T in ((16, 512), (4, 8192)):
        y, cu = empty(S, T, dtype=torch.int64), empty(S + 1, dtype=torch.int64)
        for packed in (None, cu):
            name = f"{S} x {T}{' packed' if packed is not None else ''}"
            given = y if packed is None else y.view(1, -1)
            for tail in (1.0, 0.5):
                yield (
                    f"sums {name} tail {tail}",
                    functools.partial(
                        backend.sequence_sum, empty(*given.shape), given, packed, -100, tail
                    ),
                )
                yield (
                    f"sums backward {name} tail {tail}",
                    functools.partial(
                        backend.sequence_sum_backward,
                        empty(S, dtype=FP64),
                        given,
                        packed,
                        -100,
                        tail,
                        FP32,
                    ),
                )
    for B in (2, 1000):
        u = empty(B, dtype=FP64)
        for phis in ([0], [0, 1, 2]):
            yield (
                f"pair loss {B} of {len(phis)}",
                functools.partial(
                    backend.pair_loss_forward, u, u, u, None, phis, [1.0] * 10 * len(phis)
                ),
            )
    if backend is not cuda:
        wide, narrow = empty(128256, 4096), empty(128256, 4096, dtype=BF16)
        yield (
            "scaled copy 128256 x 4096",
            functools.partial(backend.scaled_copy, wide, empty(), narrow),
        )


class _Kernel:
    """Stands for a Triton kernel: notes its launches."""

    def __init__(self, kernel, seen: list) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            annotations = inspect.signature(self.kernel.fn).parameters
            constants = {
                k: v for k, v in given.items() if "constexpr" in str(annotations[k].annotation)
            }
            free = set(_not_specialised(self.kernel))
            special = [
                k
                for k, v in given.items()
                if isinstance(v, (int, float)) and k not in constants and k not in free
            ]
            self.seen.append(
                {
                    "grid": list(grid),
                    "threads": 32 * options.pop("num_warps"),
                    **options,
                    "constexprs": dict(sorted(constants.items())),
                    "specialised": sorted(special),
                }
            )

        return launch


def _not_specialised(kernel) -> tuple[str, ...]:
    if hasattr(kernel, "kwargs"):  # interpreted
        return tuple(kernel.kwargs.get("do_not_specialize") or ())
    return tuple(kernel.do_not_specialize or ())


def triton() -> dict[str, object]:
    seen: list = []
    patches = [
        mock.patch.object(module, name, _Kernel(getattr(module, name), seen))
        for module in TRITON.values()
        for name in ("_forward", "_backward", "_kernel")
        if hasattr(module, name)
    ]
    for patch in patches:
        patch.start()
    try:
        return {name: _of(call, seen) for name, call in calls(_Functions())}
    finally:
        for patch in patches:
            patch.stop()


class _Functions:
    """The functions of the Triton backend, of the modules that are patched."""

    def __getattr__(self, name: str):
        for module in TRITON.values():
            if hasattr(module, name) and not name.startswith("_"):
                return getattr(module, name)
        raise AttributeError(name)


def _of(call: Callable[[], object], seen: list) -> object:
    seen.clear()
    call()
    return seen[0] if len(seen) == 1 else list(seen)


def cuda_cpp() -> dict[str, object]:
    from cuda_on_host import build

    # Data pointers of meta tensors are null: nothing is read.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches"
        with (
            mock.patch.dict(os.environ, CUDA_ON_HOST_RECORD=str(file)),
            mock.patch.object(cuda, "_counters", {}),
            mock.patch.object(cuda, "on_host", build.module(record=True)),
        ):

            def of(call):
                file.write_text("")
                call()
                lines = [[int(n) for n in line.split()] for line in file.read_text().splitlines()]
                made = [dict(zip(("grid", "threads", "shared"), x, strict=True)) for x in lines]
                return made[0] if len(made) == 1 else made

            return {name: of(call) for name, call in calls(cuda)}


def text(found: dict[str, object]) -> str:
    """One launch a line."""
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def difference(backend: str, found: dict[str, object]) -> str:
    then = text(json.loads(RECORDED.read_text())[backend])
    lines = difflib.unified_diff(
        then.splitlines(), text(found).splitlines(), "recorded", "now", n=0, lineterm=""
    )
    return "\n".join(lines)


def check(backend: str, found: dict[str, object]) -> None:
    if changed := difference(backend, found):
        pytest.fail(f"launches changed; if they are meant to: python {__file__}\n{changed}")


def test_triton_launches():
    found = triton()
    check("triton", found)
    for name, made in found.items():
        assert isinstance(made, dict), f"{name}: {made}"
        assert made["specialised"] == [], f"{name} is compiled anew for {made['specialised']}"


def test_cuda_launches():
    from cuda_on_host import build

    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    # In a process of its own: one that loaded the kernels to run them would run these.
    done = subprocess.run([sys.executable, __file__, "cuda"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    check("cuda", found)
    for name, made in found.items():
        assert made["shared"] <= 227 << 10 and made["threads"] <= 1024, f"{name}: {made}"


def test_a_specialised_scalar_is_noticed(monkeypatch):
    kernel = TRITON["token_logps"]._forward
    fewer = tuple(n for n in launches.VARYING if n != "rows")
    attributes = {
        "arg_names": kernel.arg_names,
        "fn": kernel.fn,
        "kwargs": {"do_not_specialize": fewer},
    }
    monkeypatch.setattr(
        TRITON["token_logps"], "_forward", mock.Mock(spec_set=list(attributes), **attributes)
    )
    with pytest.raises(pytest.fail.Exception, match=r'(?s)\+.*"specialised": \["rows"\]'):
        check("triton", triton())


def test_another_configuration_is_noticed(monkeypatch):
    config = TRITON["token_logps"].BACKWARD
    monkeypatch.setitem(config, "num_warps", 2 * config["num_warps"])
    with pytest.raises(pytest.fail.Exception, match=r"(?s)-.*backward.*\+.*backward"):
        check("triton", triton())


def shared_memory(kernels: list[dict]) -> dict[str, object]:
    """Bytes of shared memory by kernel, of what `triton_aot.py` prints for sm_90."""
    import triton as package

    by_kernel = {k["kernel"]: k["shared"] for k in kernels if k["target"] == "sm_90"}
    return {"triton": package.__version__, **by_kernel}


def compiled() -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("triton_aot.py")
    done = subprocess.run(
        [sys.executable, str(program), "sm_90"], capture_output=True, text=True, env=env, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__" and sys.argv[1:] == ["cuda"]:
    print(json.dumps(cuda_cpp()))
elif __name__ == "__main__":
    found = {"triton": triton(), "cuda": cuda_cpp(), SHARED: shared_memory(compiled())}
    parts = [f"{json.dumps(name)}: {text(rows)}" for name, rows in found.items()]
    RECORDED.write_text("{" + ",\n".join(parts) + "}\n")
