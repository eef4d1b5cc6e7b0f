"""Peak memory of a call above its inputs, each provider in a process of its own (on CPUs)."""

import conftest
import pytest

from dpo_kernels.bench import peak_memory, providers, results
from dpo_kernels.bench.run import memory_cases

QUICK = (
    "dpo-kernels cpu",
    "dpo-kernels cpu in place",
    "dpo-kernels triton",
    "torch eager",
    "TRL selective_log_softmax",
    "TRL chunked log-probs",
    "Liger DPO",
)


def pytest_generate_tests(metafunc):
    pairs = [
        (case, name)
        for case in memory_cases(conftest.DEVICE)
        for name, _ in providers.providers(case, conftest.DEVICE)
        if metafunc.config.getoption("--full") or name in QUICK
    ]
    metafunc.parametrize("case, provider", pairs, ids=[f"{c.name} - {n}" for c, n in pairs])


def test_memory(case, provider):
    found = peak_memory.weigh(case, provider, conftest.DEVICE)
    if found.note:
        assert not found.ours, found.note
        pytest.skip(f"{provider}: {found.note}")
    conftest.ROWS.append(results.as_row(found) | {"case": f"memory: {case.name}"})
