"""Where the tests of a GPU's backends run, and which kernels each of them launched.

Without a GPU Triton kernels are interpreted (that must be set before triton loads) and the CUDA
kernels are compiled for the host (cuda_on_host/). With one, a test with the parameter
`backend="triton"` or `"cuda"` makes its tensors on the GPU. Such tests carry the mark `gpu`;
`--kernel-report FILE` writes a JSON line for each: its outcome, and the kernels it launched. Every
run ends with what is known of the kernels: on a GPU, and by `make check-full`.
"""

import atexit
import functools
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
ON_GPU = ("triton", "cuda")
TOOLS = Path(__file__).parent.parent / "tools"
LAUNCHED: set[str] = set()  # kernels, by the test at work
RECORDED: set[str] = set()  # backends whose launches are recorded

# What tests cache is not the user's.
os.environ["DPO_KERNELS_CACHE"] = tempfile.mkdtemp(prefix="dpo-kernels-tests-")
atexit.register(shutil.rmtree, os.environ["DPO_KERNELS_CACHE"], ignore_errors=True)

if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--kernel-report", metavar="FILE", help="a JSON line for each test marked gpu")


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("backend") in ON_GPU:
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    file = item.config.getoption("--kernel-report")
    # One line a test: of its call, or of the phase that kept it from being called or ended it.
    if file and item.get_closest_marker("gpu") and (call.when == "call" or not report.passed):
        line = {
            "test": item.nodeid,
            "outcome": report.outcome,
            "seconds": round(call.duration, 3),
            "kernels": sorted(LAUNCHED),
            "why": report.longreprtext[-500:],
        }
        with Path(file).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    return report


def pytest_terminal_summary(terminalreporter):
    from dpo_kernels import verification

    terminalreporter.section("kernels on GPUs")
    for kernel in verification.state():
        mark = "verified" if kernel.verified else "NOT VERIFIED"
        terminalreporter.write_line(f"{kernel.kernel:<27}{mark:<14}{kernel.why}")
    spec = importlib.util.spec_from_file_location("check_full", TOOLS / "check_full.py")
    check_full = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_full)
    terminalreporter.write_line(f"make check-full: {check_full.last_result()}")


@pytest.fixture(scope="session")
def cuda_on_host():
    """The CUDA kernels as a module for CPU tensors."""
    from cuda_on_host import build

    if build.compiler() is None:
        pytest.skip("no C++ compiler: the CUDA kernels cannot be run on the host")
    return build.module()


@pytest.fixture(autouse=True)
def device(request):
    """The device of the test's tensors, its default device while it runs."""
    parameters = getattr(request.node, "callspec", None)
    backend = parameters and parameters.params.get("backend")
    torch.manual_seed(0)
    LAUNCHED.clear()
    if backend in ON_GPU:
        _record_launches(backend)
    if backend == "cuda" and not GPU:
        from dpo_kernels import backends
        from dpo_kernels.backends import cuda

        cuda.on_host = request.getfixturevalue("cuda_on_host")
        yield torch.device("cpu")
        cuda.on_host = None
        backends.load.cache_clear()
        return
    name = "cuda" if GPU and backend in ON_GPU else "cpu"
    with torch.device(name):
        yield torch.device(name)


def _record_launches(backend):
    """Wrap the functions of a backend that launch kernels, once."""
    if backend in RECORDED:
        return
    try:
        module = importlib.import_module(f"dpo_kernels.backends.{backend}")
    except ImportError:
        return  # the test says what is missing
    from dpo_kernels.verification import KERNELS

    RECORDED.add(backend)
    for kernel, functions in KERNELS.items():
        if kernel.startswith(backend + "/"):
            for name in functions:
                setattr(module, name, _recorded(kernel, getattr(module, name)))


def _recorded(kernel, function):
    @functools.wraps(function)
    def launch(*args, **kwargs):
        LAUNCHED.add(kernel)
        return function(*args, **kwargs)

    return launch
