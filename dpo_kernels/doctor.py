"""What this installation can do, what is wrong with it, and a self-test against float64.

Imports no torch by itself, so that it can say what is wrong with one. The report is a dictionary
of sections; each row of `SECTIONS` makes one and says how it reads.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import requirements
from .version import __version__

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "gguf", "matplotlib", "tqdm")
# Packages below the trainers of others, beside those trainers' own.
_BELOW_TRAINERS = ("peft", "accelerate", "datasets", "deepspeed")


class Section(NamedTuple):
    """One part of the report: its key, what it finds (plain values), and its lines for people."""

    key: str
    examine: Callable[[], Any]
    lines: Callable[[Any], list[str]]
    needs_torch: bool = True


def examine() -> dict[str, Any]:
    """Everything `dpo-kernels doctor` shows, as plain values.

    `problems` lists what is wrong and how to mend it; where torch cannot be used, the sections
    that need it are left out and the self-test has failed.
    """
    broken = requirements.torch_problem()
    report: dict[str, Any] = {"version": __version__, "python": platform.python_version()}
    report |= {"executable": sys.executable, "platform": platform.platform()}
    for section in SECTIONS:
        if broken is None or not section.needs_torch:
            report[section.key] = section.examine()
    report["problems"] = [str(broken)] if broken else []
    if broken:
        report["self_test"] = {"backend": None, "passed": False, "error": "torch cannot be used"}
        return report
    report["default_backend"], report["self_test"] = _self_test()
    # After the self-test: only now is every library of a run in the process.
    report["openmp"] = _openmp()
    report["problems"] += _problems(report)
    return report


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"dpo-kernels {report['version']}, Python {report['python']} ({report['executable']}), "
        f"{report['platform']}"
    ]
    for section in SECTIONS:
        if section.key in report:
            lines += section.lines(report[section.key])
    if "openmp" in report:
        lines += _openmp_lines(report["openmp"])
    lines += _self_test_lines(report["self_test"])
    for problem in report["problems"]:
        lines.append(f"to mend: {problem}")
    return "\n".join(lines)


def _packages() -> dict[str, str | None]:
    return {name: requirements.version_of(name) for name in _PACKAGES}


def _package_lines(versions: dict[str, str | None]) -> list[str]:
    return ["packages: " + ", ".join(f"{k} {v or 'absent'}" for k, v in versions.items())]


def _devices() -> list[str]:
    import torch

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


def _gpu_software() -> dict[str, str | None]:
    """NVIDIA's driver on this machine, and the CUDA or ROCm that torch was built for."""
    import torch

    # Of a machine without the driver the file is missing; the version is the first dotted number.
    driver = Path("/proc/driver/nvidia/version")
    words = driver.read_text(errors="replace").split() if driver.is_file() else []
    number = next((w for w in words if w.replace(".", "").isdigit() and "." in w), None)
    return {"driver": number, "torch_cuda": torch.version.cuda, "torch_hip": torch.version.hip}


def _gpu_software_lines(found: dict[str, str | None]) -> list[str]:
    built = f"CUDA {found['torch_cuda']}" if found["torch_cuda"] else "no CUDA"
    built = f"ROCm {found['torch_hip']}" if found["torch_hip"] else built
    return [f"GPU software: NVIDIA driver {found['driver'] or 'absent'}, torch built for {built}"]


def _cpu() -> dict[str, Any]:
    import torch

    from . import backends

    kernels = "none built"
    if "cpu" in backends.available():
        kernels = ", ".join(backends.load("cpu").instruction_sets())
    return {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": torch.backends.openmp.is_available(),
    }


def _cpu_lines(cpu: dict[str, Any]) -> list[str]:
    return [
        f"CPU: {cpu['instructions']} in torch, {cpu['kernels']} in our kernels; "
        f"{cpu['threads']} threads on {cpu['cores']} cores"
    ]


def _binary() -> dict[str, Any]:
    """The compiled module, the GPU architectures in it, and what each GPU here runs of them."""
    import torch

    from . import backends

    if "cpu" not in backends.available():
        return {"file": None, "architectures": [], "devices": {}}
    from . import _C
    from .backends import cuda

    devices = {
        f"cuda:{i}": cuda.code_for(*torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
        if not torch.version.hip
    }
    return {"file": _C.__file__, "architectures": cuda.architectures(), "devices": devices}


def _binary_lines(binary: dict[str, Any]) -> list[str]:
    if binary["file"] is None:
        return ["compiled module: none"]
    names = ", ".join(f"sm_{a}" for a in binary["architectures"])
    lines = [f"compiled module: {binary['file']}"]
    lines.append(f"  GPU code: {names + ' and PTX of the last' if names else 'none'}")
    return lines + [
        f"  {device} runs {code or 'none of it'}" for device, code in binary["devices"].items()
    ]


def _backends() -> dict[str, dict[str, Any]]:
    from . import backends

    usable = backends.available()
    states = {}
    for name in backends.NAMES:
        reason = usable.why_not.get(name, "")
        if not reason:
            try:
                backends.load(name)
            except Exception as error:  # e.g. a Triton that does not import
                reason = f"does not load: {type(error).__name__}: {error}"
        states[name] = {"usable": not reason, "reason": reason}
    return states


def _backend_lines(states: dict[str, dict[str, Any]]) -> list[str]:
    marks = {n: "usable" if s["usable"] else f"absent: {s['reason']}" for n, s in states.items()}
    return ["backends:", *(f"  {name:<7} {mark}" for name, mark in marks.items())]


def _openmp() -> dict[str, Any]:
    """The OpenMP runtimes in the process, the one `_C` was given, and the size of each pool."""
    import torch

    from . import backends

    ours = backends.load("cpu")._C.num_threads() if "cpu" in backends.available() else None
    return {
        "runtimes": backends.openmp.mapped(),
        "shared": backends.openmp.share(),
        "kernel_threads": ours,
        "torch_threads": torch.get_num_threads(),
    }


def _openmp_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"OpenMP: {', '.join(found['runtimes']) or 'none'}; "
        f"threads: {found['torch_threads']} of torch, {found['kernel_threads'] or 'none'} of ours"
    ]


def _self_test() -> tuple[str, dict[str, Any]]:
    """The backend that `backend=None` means here, and its self-test."""
    import torch

    from . import backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = backends.choose(None, device, torch.float32)
    return default, self_test(default, device)


def self_test(backend: str, device: Any) -> dict[str, Any]:
    """Loss and gradient of a tiny batch on `backend` against plain torch in float64.

    Passes where both are as close as fp32 rounding allows (relative 1e-4).
    """
    import torch

    import dpo_kernels as dk

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
        "backend": backend,
        "passed": loss_error < 1e-4 and grad_error < 1e-4,
        "loss_error": loss_error,
        "gradient_error": grad_error,
    }


def _self_test_lines(test: dict[str, Any]) -> list[str]:
    if "error" in test:
        detail = test["error"]
    else:
        detail = (
            f"relative error of the loss {test['loss_error']:.1e}, of the gradient "
            f"{test['gradient_error']:.1e}"
        )
    name = f"self-test of {test['backend']} (the default here)" if test["backend"] else "self-test"
    return [f"{name}: {'passed' if test['passed'] else 'FAILED'} ({detail})"]


def _problems(report: dict[str, Any]) -> list[str]:
    """What is wrong and how to mend it; a backend that cannot be here by nature is no problem."""
    problems = []
    software, gpus = report["gpu_software"], len(report["devices"]) - 1
    if report["binary"]["file"] is None:
        problems.append(report["backends"]["cpu"]["reason"])
    elif not report["self_test"]["passed"]:
        problems.append(
            "the default backend fails its self-test: until that is understood, pass "
            "backend='torch'"
        )
    for package in ("triton", "transformers"):
        wanted = package != "triton" or gpus or report["packages"]["triton"]
        if wanted and (reason := requirements.why_not(package)):
            problems.append(reason)
    if software["driver"] and not gpus:
        if not software["torch_cuda"]:
            problems.append(
                "an NVIDIA driver is here, but torch is a build without CUDA: install "
                "a CUDA build of torch"
            )
        elif os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            problems.append(
                f"torch sees no GPU: CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
            )
        else:
            problems.append(
                f"torch sees no GPU: driver {software['driver']} may be too old for "
                f"CUDA {software['torch_cuda']}"
            )
    for device, code in report["binary"]["devices"].items():
        if report["binary"]["architectures"] and not code:
            problems.append(
                f"the compiled module has no code for {device}: use backend='triton', "
                "or build with DPO_KERNELS_ARCHS"
            )
    openmp = report["openmp"]
    if len(openmp["runtimes"]) > 1:
        problems.append(
            f"{len(openmp['runtimes'])} OpenMP runtimes are in this process and their threads "
            f"compete: {', '.join(openmp['runtimes'])}. See what loads one beside torch's "
            "(LD_PRELOAD, a package imported before torch)"
        )
    elif openmp["kernel_threads"] not in (None, openmp["torch_threads"]):
        problems.append(
            "the kernels' number of threads is not torch's: see OMP_NUM_THREADS and "
            "torch.set_num_threads"
        )
    return problems


def _gpu_verification() -> dict[str, dict[str, Any]]:
    """Each kernel: whether it has passed on a GPU as it is now, and where, or why not."""
    from . import verification

    return {k.kernel: {"verified": k.verified, "why": k.why} for k in verification.state()}


def _gpu_verification_lines(kernels: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["kernels verified on a GPU (make gpu-check):"]
    for name, state in kernels.items():
        mark = "" if state["verified"] else "NOT VERIFIED: "
        lines.append(f"  {name:<27}{mark}{state['why']}")
    return lines


def _trainers() -> dict[str, Any]:
    """Other packages' DPO trainers, and what a patch would do with each; none is imported."""
    from .integrations import shapes

    return {
        "packages": {name: requirements.version_of(name) for name in _BELOW_TRAINERS},
        "trainers": {t.package: shapes.what_a_patch_does(t) for t in shapes.TRAINERS},
    }


def _trainer_lines(found: dict[str, Any]) -> list[str]:
    below = ", ".join(f"{name} {v or 'absent'}" for name, v in found["packages"].items())
    lines = [f"DPO trainers of other packages ({below}):"]
    return lines + [f"  {name:<13}{what}" for name, what in found["trainers"].items()]


# In the order of the report. OpenMP and the self-test come after these.
SECTIONS = (
    Section("packages", _packages, _package_lines, needs_torch=False),
    Section("trainers", _trainers, _trainer_lines, needs_torch=False),
    Section("devices", _devices, lambda names: [f"devices: {', '.join(names)}"]),
    Section("gpu_software", _gpu_software, _gpu_software_lines),
    Section("cpu", _cpu, _cpu_lines),
    Section("binary", _binary, _binary_lines),
    Section("backends", _backends, _backend_lines),
    Section("gpu_verification", _gpu_verification, _gpu_verification_lines),
)
