"""What the compiler made of the CUDA kernels: every architecture, no spills, register budgets."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from dpo_kernels import _C

ARCHITECTURES = [a for a in _C.cuda_architectures.split(",") if a]
BUDGET = json.loads(Path(__file__).with_name("cuda_budget.json").read_text())

pytestmark = [
    pytest.mark.skipif(not ARCHITECTURES, reason="this build has no CUDA kernels (no nvcc)"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="cuobjdump comes with triton"
    ),
]


def cuobjdump(*arguments):
    spec = importlib.util.find_spec("triton")
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), *arguments, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def family(function: str) -> str:
    """E.g. `forward stats` from a mangled name; template flags are SOFTCAP, STATS."""
    flags = re.findall(r"Lb([01])E", function)
    if "7forward" in function:
        return "forward" + " stats" * (flags[1] == "1")
    if "8backward" in function:
        return "backward"
    return "pair_loss" if "pair_loss" in function else "sequence_sum"


def test_registers_and_spills_are_in_budget():
    seen: dict[str, dict[str, int]] = {}
    architecture = ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", line):
            registers, stack, local = map(int, match.groups())
            assert stack == local == 0, (
                f"sm_{architecture} {function} spills: {stack} + {local} bytes"
            )
            kernel = seen.setdefault(family(function), {})
            kernel[architecture] = max(registers, kernel.get(architecture, 0))
    print(json.dumps(seen, indent=1))
    assert set(seen) == set(BUDGET["registers"])
    for kernel, by_architecture in seen.items():
        assert set(by_architecture) == set(ARCHITECTURES), (kernel, by_architecture)
        allowed = BUDGET["registers"][kernel]
        for name, registers in by_architecture.items():
            assert registers <= allowed, f"{kernel} sm_{name}: {registers} registers of {allowed}"


@pytest.mark.skipif("90" not in ARCHITECTURES, reason="this build has no code for sm_90")
def test_instructions_that_only_a_gpu_executes():
    """Barriers, waits and ordered atomics are there, and memory is moved 16 bytes at a time."""
    text = cuobjdump("-sass", "-arch", "sm_90")
    checked = 0
    for part in text.split("Function : ")[1:]:
        function = part.split("\n", 1)[0]
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part, re.M)
        for instruction, least in (
            BUDGET["instructions"].get(family(function).split()[0], {}).items()
        ):
            count = sum(name.startswith(instruction) for name in found)
            assert count >= least, f"{function}: {count} {instruction} of {least}"
            checked += 1
    assert checked == 12 * 10 + 10 * 3 + 2, checked  # 12 forwards, 10 backwards, 2 sums
