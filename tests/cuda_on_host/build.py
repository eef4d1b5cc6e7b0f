"""Compile the sources of csrc/cuda as C++ with the host's compiler.

`module()` is the package's compiled module with the CUDA kernels alone, for CPU tensors;
`program(sanitizer)` is check.cpp with the same kernels. Both are made once per state of the
sources. Launches are small here (two warps that read, two pretended multiprocessors), so that few
rows meet every schedule: waiting copies, split rows, rows handed from block to block.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
CONFIG = [
    "-DDPO_FORWARD_CONFIG=64,4,3,2",
    "-DDPO_FORWARD_RICH_CONFIG=64,3,2,2",
    "-DDPO_FORWARD_CAPPED_CONFIG=64,2,2,2",
    "-DDPO_BACKWARD_CONFIG=64,2,2,4",
]
SANITIZERS = {
    "": ["-O1"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread", "-DCUDA_ON_HOST_THREADS"],
}


def compiler() -> str | None:
    wish = os.environ.get("CXX")
    return next((p for n in ([wish] if wish else ["g++", "c++"]) if (p := shutil.which(n))), None)


def _compile(
    sources: list[Path], flags: list[str], output: str, link: list[str], csrc: Path = CSRC
) -> Path:
    """`output` from `sources`, in a folder named after all that goes into it."""
    cxx = compiler()
    assert cxx is not None
    inputs = sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cu"), *HERE.glob("*.[hc]*"), *sources])
    text = "\0".join([cxx, *flags, *link, *(f"{p.name}\0{p.read_text()}" for p in inputs)])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"dpo-cuda-on-host-{os.getuid()}" / key
    target = folder / output
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    common = [
        cxx,
        "-std=c++17",
        "-g",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-pthread",
        "-fPIC",
        f"-I{csrc}",
        "-include",
        str(HERE / "cuda_on_host.h"),
        *flags,
    ]

    def one(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        run([*common, "-x", "c++", "-c", str(source), "-o", str(made)])
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, sources))
    part = folder / f"{output}.{os.getpid()}"
    run([cxx, *flags, "-pthread", *objects, *link, "-o", str(part)])
    part.rename(target)
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def kernels(csrc: Path = CSRC) -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))


def program(sanitizer: str, csrc: Path = CSRC) -> Path:
    """The checks of check.cpp, with the kernels under a sanitizer ("" for none)."""
    flags = [*CONFIG, *SANITIZERS[sanitizer]]
    return _compile([HERE / "check.cpp", *kernels(csrc)], flags, "check", [], csrc)


def execute(
    program: Path, cases: int, seed: int = 0, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """A program's run over so many random cases; it ends with 0 where all are right."""
    command = [str(program), str(cases), str(seed)]
    if setarch := shutil.which("setarch"):  # ThreadSanitizer needs plain addresses
        command = [setarch, platform.machine(), "-R", *command]
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)


def module(record: bool = False) -> ModuleType:
    """The kernels as a Python module that takes pointers to host memory.

    `record`: at their real configuration, for 132 multiprocessors; a launch runs nothing but adds
    a line "grid threads shared" to the file that the variable CUDA_ON_HOST_RECORD names.
    """
    import pybind11

    made = ["-O0", "-DCUDA_ON_HOST_RECORD"] if record else ["-O1", *CONFIG]
    flags = [
        *made,
        "-DCUDA_ON_HOST",
        "-DDPO_CUDA",
        "-fvisibility=hidden",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
    ]
    name = f"_cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    path = _compile([CSRC / "bindings.cpp", *kernels()], flags, name, ["-shared"])
    spec = importlib.util.spec_from_file_location("_cuda_on_host", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
