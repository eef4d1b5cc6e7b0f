"""What this installation can do: versions, devices, backends, and a self-test against float64."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dpo_kernels as dk

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "gguf", "matplotlib", "tqdm")


def examine() -> dict[str, Any]:
    """Everything `dpo-kernels doctor` shows, as plain values."""
    usable = dk.backends.available()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = dk.backends.choose(None, device, torch.float32)
    return {
        "version": dk.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "cpu": {
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "kernels": _kernel_instructions(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "openmp": torch.backends.openmp.is_available(),
        },
        "backends": {
            name: {"usable": name in usable, "reason": usable.why_not.get(name, "")}
            for name in dk.backends.NAMES
        },
        "default_backend": default,
        "self_test": self_test(default, device),
    }


def self_test(backend: str, device: torch.device) -> dict[str, Any]:
    """Loss and gradient of a tiny batch on `backend` against plain torch in float64.

    Passes where both are as close as fp32 rounding allows (relative 1e-4).
    """
    generator = torch.Generator().manual_seed(0)
    B, T, V = 3, 7, 61
    logits = torch.randn(2 * B, T, V, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, V, (2 * B, T), generator=generator)
    labels[:, :2] = -100
    ref = torch.randn(2 * B, generator=generator, dtype=torch.float64) - 30
    exact = logits.clone().requires_grad_()
    table = exact[:, :-1].log_softmax(-1)
    target = labels[:, 1:]
    picked = table.gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target >= 0)
    ratio = picked.sum(-1) - ref
    truth = torch.nn.functional.softplus(-0.1 * (ratio[:B] - ratio[B:])).mean()
    truth.backward()
    try:
        x = logits.float().to(device).requires_grad_()
        out = dk.fused_dpo_loss(
            x, labels.to(device), ref_logps=ref.float().to(device), backend=backend
        )
        out.loss.backward()
        assert x.grad is not None and exact.grad is not None
        loss_error = abs(out.loss.item() - truth.item()) / truth.item()
        difference = (x.grad.cpu().double() - exact.grad).abs().max()
        grad_error = float(difference / exact.grad.abs().max())
    except Exception as error:  # whatever stops the kernels is what the user came to see
        return {"backend": backend, "passed": False, "error": f"{type(error).__name__}: {error}"}
    return {
        "backend": backend, "passed": loss_error < 1e-4 and grad_error < 1e-4,
        "loss_error": loss_error, "gradient_error": grad_error,
    }  # fmt: skip


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    cpu, test = report["cpu"], report["self_test"]
    packages = ", ".join(f"{k} {v or 'absent'}" for k, v in report["packages"].items())
    lines = [
        f"dpo-kernels {report['version']}, Python {report['python']}, {report['platform']}",
        f"packages: {packages}",
        f"devices: {', '.join(report['devices'])}",
        f"CPU: {cpu['instructions']} in torch, {cpu['kernels']} in our kernels; "
        f"{cpu['threads']} threads on {cpu['cores']} cores, "
        f"OpenMP {'yes' if cpu['openmp'] else 'no'}",
        "backends:",
    ]
    for name, state in report["backends"].items():
        mark = "usable" if state["usable"] else f"absent: {state['reason']}"
        chosen = " (default here)" if name == report["default_backend"] else ""
        lines.append(f"  {name:<7} {mark}{chosen}")
    if test["passed"]:
        lines.append(
            f"self-test of {test['backend']}: passed (relative error of the loss "
            f"{test['loss_error']:.1e}, of the gradient {test['gradient_error']:.1e})"
        )
    else:
        detail = test.get("error") or (
            f"relative error of the loss {test['loss_error']:.1e}, of the gradient "
            f"{test['gradient_error']:.1e}"
        )
        lines.append(f"self-test of {test['backend']}: FAILED ({detail})")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    names = [f"cpu ({_cpu_name()})"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        names.append(f"cuda:{i} ({p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB)")
    return names


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _kernel_instructions() -> str:
    """The instruction set that the compiled kernels chose at run time."""
    if "cpu" not in dk.backends.available():
        return "none built"
    return str(dk.backends.load("cpu")._C.instruction_sets())
