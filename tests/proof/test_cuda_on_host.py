"""The device code of the CUDA kernels, run on the host and under the sanitizers: logic, not speed.

Values are checked on many more inputs by the tests with `backend="cuda"`; here the same source runs
where a read out of bounds, undefined behaviour or a missing barrier ends the program.
"""

import pytest
from cuda_on_host import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize("sanitizer, cases", [("", 30), ("address", 8), ("thread", 3)])
def test_kernels_on_the_host(sanitizer, cases):
    done = build.execute(build.program(sanitizer), cases)
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot map its memory on this kernel")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{cases} cases, 0 wrong" in done.stdout
