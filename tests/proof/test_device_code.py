"""What the host cannot execute of the CUDA sources: inline PTX and CUDA's functions, word by word.

On the host each of them has a twin in plain C++, so an error in the original would pass every test
here. A change has to be looked at and run on a GPU; then the text below is brought up to date.
"""

import json
import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
RECORDED = Path(__file__).with_name("device_code.json")


def device_only() -> dict[str, str]:
    """The branches that only nvcc compiles, by file and number."""
    found = {}
    for path in sorted([*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir()]):
        blocks = re.findall(r"#ifdef __CUDACC__\n(.*?)#(?:else|endif)", path.read_text(), re.DOTALL)
        for number, block in enumerate(blocks):
            found[f"{path.relative_to(CSRC)} {number}"] = " ".join(block.split())
    return found


def test_device_code_is_as_recorded():
    now, then = device_only(), json.loads(RECORDED.read_text())
    changed = {key: text for key, text in now.items() if then.get(key) != text}
    assert not changed and set(now) == set(then), (
        f"code that only a GPU executes has changed: {changed or set(then) - set(now)}; check it "
        "by eye and by make gpu-check, then write device_only() to tests/proof/device_code.json"
    )


def test_the_twins_stand_in_one_file():
    assert {key.split()[0] for key in device_only()} == {"cuda/device.h", "phi.h"}
