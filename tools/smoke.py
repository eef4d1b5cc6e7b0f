"""What an installed wheel must do, run from a folder without the sources: `python smoke.py`.

Every op of the CPU backend in every instruction set against the formula in float64, every loss
against the torch backend in float64, both front functions, errors that cross from C++, the doctor,
one OpenMP pool, and a few steps of the embedded training.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import dpo_kernels as dk
from dpo_kernels import _C, losses

# `dpo-kernels train` of the embedded default with its recipe cut short.
TRAIN = """
import sys
from dpo_kernels.cli import main
from dpo_kernels.data import embedded
recipe = embedded.recipe()
recipe["sft"] |= {"max_steps": 3}
recipe["dpo"] |= {"max_steps": 3}
recipe["sample"]["max_new_tokens"] = 4
embedded.recipe = lambda: recipe
sys.exit(main(["train", *sys.argv[1:]]))
"""
B, T, V, H = 3, 9, 203, 16


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * B, T, V, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, V, (2 * B, T), generator=generator)
    labels[:, :3] = -100
    labels[1, 5:] = -100
    return logits, labels, torch.randn(2 * B, generator=generator, dtype=torch.float64) - 30


def formula(logits, labels, ref_logps, beta=0.1):
    """DPO in float64: loss, and the summed log-probs it is made of."""
    table = logits[:, :-1].log_softmax(-1)
    target = labels[:, 1:]
    picked = table.gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target >= 0)
    logps = picked.sum(-1)
    ratio = logps - ref_logps
    return torch.nn.functional.softplus(-beta * (ratio[:B] - ratio[B:])).mean(), logps


def close(name: str, got: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    error = float((got.double() - truth).abs().max() / truth.abs().max())
    if not error <= tolerance:
        raise SystemExit(f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}")


def test_kernels() -> int:
    """Log-probs, sums, pair loss and their gradients; returns how many cases."""
    exact, labels, ref = batch()
    cases = 0
    for isa in _C.instruction_sets().split(","):
        _C.use_instruction_set(isa)
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.half, 2e-3)):
            x = exact.to(dtype).requires_grad_()
            y = x.detach().double().requires_grad_()
            out = dk.fused_dpo_loss(x, labels, ref_logps=ref.float(), backend="cpu")
            truth, logps = formula(y, labels, ref.float().double())
            out.loss.backward()
            truth.backward()
            scored = dk.sequence_logps(x.detach(), labels, backend="cpu")
            close(f"{isa} {dtype} log-probs", scored, logps.detach(), 2e-6)
            close(f"{isa} {dtype} loss", out.loss.detach(), truth.detach(), 2e-6)
            close(f"{isa} {dtype} gradient", x.grad, y.grad, tolerance)
            cases += 3
    _C.use_instruction_set(_C.instruction_sets().split(",")[0])
    return cases


def test_losses() -> int:
    logits, labels, ref = batch()
    for name in losses.available():
        needed = {"offset": torch.tensor([0.1, 0.2, 0.0])} if name == "odpo" else {}
        needed |= {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
        key, value = "ref_logps", ref
        if losses.get(name).needs_kl:
            key, value = "ref_logits", logits.flip(-1) / 2
        results = []
        for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
            x = logits.to(dtype, copy=True).requires_grad_()
            out = dk.fused_dpo_loss(
                x, labels, loss_type=name, backend=backend, **{key: value.to(dtype)}, **needed
            )
            out.loss.backward()
            results.append((out.loss.detach().double(), x.grad.double()))
        (loss, grad), (true_loss, true_grad) = results
        close(f"{name} loss", loss, true_loss, 2e-5)
        close(f"{name} gradient", grad, true_grad, 2e-5)
    return len(losses.available())


def test_linear_head() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2 * B, T, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    _, labels, ref = batch()
    truth, _ = formula(hidden @ weight.T, labels, ref)
    h, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
    out = dk.fused_linear_dpo_loss(h, w, labels, ref_logps=ref.float(), backend="cpu")
    out.loss.backward()
    close("linear head loss", out.loss.detach(), truth, 1e-5)


def test_errors_cross_from_cpp() -> str:
    try:
        _C.pair_loss(0, 0, 0, 0, ["x"], [], 0, 0, 0)
    except TypeError:
        pass
    else:
        raise SystemExit("a wrong argument raised nothing")
    if not _C.cuda_architectures or torch.cuda.is_available():
        return "TypeError"
    try:  # the CUDA runtime is inside: it loads without a driver, and says that there is none
        _C.cuda_pair_loss(0, 0, 0, 0, [], [], 1, 0, 0, 0, 0)
    except RuntimeError as error:
        return f"TypeError, {error}"
    raise SystemExit("a CUDA kernel launched without a driver raised nothing")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def test_command_line() -> str:
    tool = str(Path(sys.executable).parent / "dpo-kernels")
    report = json.loads(run(tool, "doctor", "--json"))
    if len(report["openmp"]["runtimes"]) != 1:
        raise SystemExit(f"more than one OpenMP pool: {report['openmp']}")
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-c", TRAIN, "--output_dir", f"{folder}/run", "--device", "cpu")
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    if summary["steps"] != 3:
        raise SystemExit(f"3 steps were asked for, {summary['steps']} were done")
    return report["openmp"]["runtimes"][0]


def main() -> None:
    if "site-packages" not in dk.__file__:
        raise SystemExit(f"dpo_kernels comes from {dk.__file__}, not from an installed wheel")
    print(
        f"dpo-kernels {dk.__version__} from {Path(dk.__file__).parent}, torch {torch.__version__}"
    )
    print(f"kernels: {test_kernels()} cases ({_C.instruction_sets()}) within float32 of float64")
    print(f"losses: {test_losses()} against float64")
    test_linear_head()
    print(f"linear head: as float64\nerrors from C++: {test_errors_cross_from_cpp()}")
    print(f"doctor and 3 steps of the embedded training: passed; OpenMP of {test_command_line()}")


if __name__ == "__main__":
    main()
