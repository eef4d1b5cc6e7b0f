"""Every provider of every case: checked against float64, timed in turns with the others.

All providers of a case are measured together by the first of its tests; each test then plays its
provider's rounds back through pytest-benchmark, so that its tables, files and `compare` hold them.
"""

import functools

import conftest
import pytest

from dpo_kernels.bench import cases, measure, providers, results
from dpo_kernels.bench.run import ROUNDS


class PlayedBack:
    """A clock that shows the seconds that were measured, a pair of calls a round."""

    def __init__(self):
        self.now, self.rounds, self.started = 0.0, [], False

    def __call__(self):
        self.started = not self.started
        if not self.started and self.rounds:
            self.now += self.rounds.pop(0)
        return self.now


CLOCK = PlayedBack()


def pytest_generate_tests(metafunc):
    chosen = cases.full if metafunc.config.getoption("--full") else cases.quick
    pairs = [
        (case, name)
        for case in chosen(conftest.DEVICE)
        for name, _ in providers.providers(case, conftest.DEVICE)
    ]
    metafunc.parametrize("case, provider", pairs, ids=[f"{c.name} - {n}" for c, n in pairs])


@functools.cache
def measured(case, rounds):
    found = {m.provider: m for m in measure.measure(case, conftest.DEVICE, rounds)}
    conftest.ROWS.extend(results.as_row(m) for m in found.values())
    return found


@pytest.mark.benchmark(timer=CLOCK)
def test_throughput(benchmark, request, case, provider):
    rounds = ROUNDS["full" if request.config.getoption("--full") else "quick"]
    result = measured(case, rounds)[provider]
    if result.note.startswith(("absent", "failed")):
        pytest.skip(f"{provider}: {result.note}")
    if result.note:
        if result.ours:
            pytest.fail(result.note)
        pytest.xfail(f"{provider}: {result.note}")
    benchmark.group = case.name
    benchmark.name = provider
    benchmark.extra_info.update(results.as_row(result))
    CLOCK.rounds, CLOCK.started = list(result.seconds), False
    benchmark.pedantic(lambda: None, rounds=len(result.seconds), iterations=1)
