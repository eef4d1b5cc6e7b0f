"""Peak memory of a call above its inputs, each provider in a process of its own (on CPUs)."""

import conftest
import pytest

from dpo_kernels.bench import memory, providers, results
from dpo_kernels.bench.measure import Measurement
from dpo_kernels.bench.run import memory_cases

QUICK = ("dpo-kernels cpu", "dpo-kernels cpu in place", "dpo-kernels triton", "torch eager",
         "TRL selective_log_softmax", "TRL chunked log-probs", "Liger DPO")  # fmt: skip


def pytest_generate_tests(metafunc):
    pairs = [(case, name) for case in memory_cases(conftest.DEVICE)
             for name, _ in providers.providers(case, conftest.DEVICE)
             if metafunc.config.getoption("--full") or name in QUICK]  # fmt: skip
    metafunc.parametrize("case, provider", pairs, ids=[f"{c.name} - {n}" for c, n in pairs])


def test_memory(case, provider):
    ours = provider.startswith("dpo-kernels")
    found = memory.peak_bytes(case, provider, conftest.DEVICE)
    if isinstance(found, str):
        assert not ours, found
        pytest.skip(f"{provider}: {found}")
    row = results.as_row(Measurement(case, provider, ours=ours, peak_bytes=found))
    conftest.ROWS.append(row | {"case": f"memory: {case.name}"})
