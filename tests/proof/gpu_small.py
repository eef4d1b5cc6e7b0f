"""A few small cases of every kernel on both GPU backends, checked against float64: a program.

For compute-sanitizer, under which a test suite would take hours; `tools/gpu_check.py` runs it.
Without a GPU it runs on the host, to rehearse.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # cuda_on_host

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import dpo_kernels as dk  # noqa: E402
from dpo_kernels import verification  # noqa: E402

SHAPES = ((2, 5, 61), (4, 7, 1031), (6, 3, 4099))  # rows, positions, vocabulary
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = ({}, {"logit_softcap": 20.0, "temperature": 1.2})
LOSSES = ({}, {"loss_type": "ipo"}, {"ld_alpha": 0.5})  # one autograd function, and the composition


def step(logits, labels, ref, backend, **options):
    x = logits.detach().requires_grad_()
    out = dk.fused_dpo_loss(x, labels, ref_logps=ref, backend=backend, **options)
    out.loss.backward()
    return torch.cat([out.loss.detach().double().view(1), x.grad.double().flatten()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("triton", "cuda"), help="one of them; else both")
    parser.add_argument("--few", action="store_true", help="one shape, two dtypes: for sanitizers")
    options = parser.parse_args()
    backends = (options.backend,) if options.backend else ("triton", "cuda")
    device = "cuda" if GPU else "cpu"
    if not GPU:
        from cuda_on_host import build

        from dpo_kernels.backends import cuda

        cuda.on_host = build.module()
    torch.manual_seed(0)
    cases = 0
    for backend in backends:
        for R, T, V in SHAPES[1:2] if options.few else SHAPES if GPU else SHAPES[:1]:
            for dtype in DTYPES[: 2 if options.few else 3]:
                wide = torch.randn(R, T, V + 3, device=device).mul_(3).to(dtype)
                logits = wide[..., :V]  # rows that are not aligned
                labels = torch.randint(0, V, (R, T), device=device)
                labels[0, :2] = -100
                ref = torch.randn(R, device=device) - 5.0 * T
                for transform in TRANSFORMS:
                    for loss in LOSSES:
                        got = step(logits, labels, ref, backend, **transform, **loss)
                        exact = step(logits.double(), labels, ref, "torch", **transform, **loss)
                        error = (got - exact).abs() - exact.abs() * torch.finfo(dtype).eps
                        assert error.max() < 1e-4, (backend, V, dtype, transform, loss, error.max())
                        cases += 1
                if backend == "triton":  # the KL of reference and policy
                    other = {"ref_logits": logits.flip(0), "loss_type": "tdpo2"}
                    x, wide_x = logits.detach().requires_grad_(), logits.double().requires_grad_()
                    dk.fused_dpo_loss(x, labels, backend=backend, **other).loss.backward()
                    other["ref_logits"] = other["ref_logits"].double()
                    dk.fused_dpo_loss(wide_x, labels, backend="torch", **other).loss.backward()
                    error = (x.grad - wide_x.grad).abs() - wide_x.grad.abs() * torch.finfo(
                        dtype
                    ).eps
                    assert error.max() < 1e-4, (V, dtype, error.max())
                    cases += 1
                call = {"backend": backend, "stats": ("entropy", "is_top1"), "reduction": "none"}
                _, stats = dk.sequence_logps(logits, labels, **call)
                assert stats["entropy"].isfinite().all()
    kernels = ", ".join(k for k in verification.KERNELS if k.split("/")[0] in backends)
    print(f"{cases} cases of {kernels}: right")


if __name__ == "__main__":
    main()
