"""Where the tests of a GPU's backends run: on the GPU if there is one, else on the host.

Without a GPU Triton kernels are interpreted (that must be set before triton loads) and the CUDA
kernels are compiled for the host (cuda_on_host/). With one, a test with the parameter
`backend="triton"` or `"cuda"` makes its tensors on the GPU. Such tests carry the mark `gpu`.
"""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
ON_GPU = ("triton", "cuda")

if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("backend") in ON_GPU:
            item.add_marker(pytest.mark.gpu)


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
