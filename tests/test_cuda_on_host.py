"""The device code of the CUDA kernels, run on the host and under the sanitizers: logic, not speed.

Values are checked on many more inputs by the tests with `backend="cuda"`; here the same source runs
where a read out of bounds, undefined behaviour or a missing barrier ends the program.
"""

import os
import platform
import shutil
import subprocess

import pytest
from cuda_on_host import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def run(program, cases, seed=0):
    command = [str(program), str(cases), str(seed)]
    if setarch := shutil.which("setarch"):  # ThreadSanitizer needs plain addresses
        command = [setarch, platform.machine(), "-R", *command]
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)


@pytest.mark.parametrize("sanitizer, cases", [("", 30), ("address", 8), ("thread", 3)])
def test_kernels_on_the_host(sanitizer, cases):
    done = run(build.program(sanitizer), cases)
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot map its memory on this kernel")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{cases} cases, 0 wrong" in done.stdout
