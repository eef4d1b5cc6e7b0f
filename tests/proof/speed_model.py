"""A model of the row kernels' speed, from machine code alone: `sass.py` counts, this judges.

Of each kernel it takes the hot loop's cheapest way around (`sass.Loop.path`), or for a kernel
without a loop the cheapest way through, and predicts the percent of the copy bandwidth on devices
of sm_90. An instruction of a warp takes one of 128 slots a clock and multiprocessor, of which such
code fills `SUSTAINED`; special functions and conversions to fp64 take one of 16. Bytes, clocks and
slots are an H100's and an H200's. What a row costs besides its elements is not in the model, so it
speaks of long rows.

    python tests/proof/speed_model.py   # writes tests/proof/sass.json, for docs/kernels.md
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import sass

RECORDED = Path(__file__).with_name("sass.json")
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
SLOTS, SPECIAL = 128, 16  # a clock and multiprocessor
SUSTAINED = 0.75  # of the slots: between 0.7 and 0.8 of them where kernels were bound by issue
BYTES = {"H100": 13.0, "H200": 18.5}  # that a copy moves, a clock and multiprocessor
B200 = 25.0  # the same, from its data sheet (90 % of 8 TB/s, 148 multiprocessors, 1.97 GHz)
IN_FLIGHT = 32 << 10  # bytes a multiprocessor that keep memory busy
SPECIAL_OPS = ("MUFU", "F2F")
REGISTERS, THREADS, SHARED = 65536, 2048, 228 << 10  # of a multiprocessor of sm_90

# Instructions an element on sm_90, at most. Those of Triton are what its compiler makes of kernels
# that serve other GPUs.
GOALS = {
    "cuda": {
        "forward": (8, 10),  # narrow, fp32
        "forward stats": (14, 18),
        "forward softcap": (20, 22),
        "forward softcap stats": (26, 32),
        "backward": (8, 9),
        "backward softcap": (23, 25),
    },
    "triton": {
        "forward": (12, 13),
        "forward stats": (25, 27),
        "forward softcap": (36, 37),
        "forward softcap stats": (49, 52),
        "backward": (48, 52),
        "backward softcap": (66, 70),
        "kl forward": (56, 56),
        "kl forward softcap": (100, 100),
        "kl backward": (300, 300),
        "kl backward softcap": (500, 500),
    },
}
# Issue time over copy time on an H100, at most: room for what a row costs besides its elements.
ISSUE = 0.7
# Those that do not meet it, (16-bit, fp32 read). A soft cap is a polynomial: its goal of 20
# instructions is 1.0 of a 16-bit copy by itself. Where CUDA C++ has a kernel, Triton's is not the
# one taken.
SLOWER = {
    ("cuda", "forward softcap"): (0.95, ISSUE),
    ("cuda", "forward softcap stats"): (1.3, 0.8),
    ("triton", "forward stats"): (1.25, ISSUE),
    ("triton", "forward softcap"): (1.8, 0.9),
    ("triton", "forward softcap stats"): (2.4, 1.25),
    ("triton", "backward softcap"): (1.45, 0.95),
    ("triton", "kl forward"): (1.4, ISSUE),
    ("triton", "kl forward softcap"): (2.45, 1.2),
    ("triton", "kl backward softcap"): (1.5, 0.85),
}
# MUFU an element of Triton's kernels, at most; of CUDA C++ it is one exponential.
MUFU = {
    "forward": 1.5,
    "forward softcap": 3.5,
    "backward": 2.0,
    "backward softcap": 4.5,
    "kl forward": 4.0,
    "kl forward softcap": 8.0,
    "kl backward": 12.0,
    "kl backward softcap": 20.0,
}
# Triton's pipeline of asynchronous copies has two barriers a tile. A reduction over an axis that
# the layout splits over warps would have many more.
BARRIERS = {"cuda": 0, "triton": 2}


@dataclass(frozen=True)
class Kernel:
    """A kernel's code, and what its launch says of it."""

    backend: str
    name: str  # of GOALS
    dtypes: tuple[str, ...]  # of what it reads, and of what it writes of that size
    reads: int  # tensors
    function: sass.Function
    in_flight: int  # bytes a multiprocessor


@dataclass(frozen=True)
class Found:
    instructions: float  # an element
    special: float  # an element, conversions to fp64 among them
    mufu: float  # an element
    elements: int  # of a way around
    barriers: int
    calls: int
    narrow_loads: int  # below 16 bytes
    in_flight: int
    bytes: int  # an element

    def issue(self, bytes_a_clock: float) -> float:
        """Time to issue the instructions, each slot filled, over the time of the copy."""
        return self.instructions / SLOTS / (self.bytes / bytes_a_clock)

    def percent(self, device: str) -> float:
        """Of the copy bandwidth."""
        copy = self.bytes / BYTES[device]
        issue = self.instructions / SLOTS / SUSTAINED
        return 100 * min(1.0, copy / issue, copy / (self.special / SPECIAL))


def measure(kernel: Kernel) -> Found:
    read = sum(ITEM[d] for d in kernel.dtypes[: kernel.reads])
    hot = kernel.function.hot or kernel.function.through
    loops = kernel.backend == "cuda"
    assert hot.vectors and (kernel.function.hot or not loops), "no loop with 16-byte loads"
    elements = hot.vectors * 16 // read
    path = hot.path(elements * kernel.reads)
    loads = [i for i in path if i.is_a("LDG")]
    if hot is kernel.function.through:  # labels, gradients, what lies outside the whole vectors
        loads = []
    return Found(
        instructions=len(path) / elements,
        special=sum(i.is_a(*SPECIAL_OPS) for i in path) / elements,
        mufu=sum(i.is_a("MUFU") for i in path) / elements,
        elements=elements,
        barriers=sum(i.is_a("BAR") for i in hot.instructions) if hot.tails else 0,
        # Behind a predicate it is the far end of a branch that leaves the loop.
        calls=sum(i.is_a("CALL") and not i.predicate for i in path),
        narrow_loads=sum(not i.wide for i in loads),
        in_flight=kernel.in_flight,
        bytes=sum(ITEM[d] for d in kernel.dtypes),
    )


def complaints(kernel: Kernel, goals: bool) -> list[str]:
    """What of a kernel is not as it should be; `goals`: also instructions, which depend on the
    architecture."""
    try:
        found = measure(kernel)
    except AssertionError as nothing:
        return [f"{kernel.backend} {kernel.name} {' '.join(kernel.dtypes)}: {nothing}"]
    said = []
    allowed = 0 if kernel.function.hot is None else BARRIERS[kernel.backend]
    if "kl" in kernel.name:
        allowed = 0
    if kernel.function.hot is not None and found.barriers > allowed:
        said.append(f"{found.barriers} barriers in the loop, {allowed} allowed")
    if found.calls:
        said.append(f"{found.calls} calls on the main path")
    if found.narrow_loads:
        said.append(f"{found.narrow_loads} loads below 16 bytes in the loop")
    if goals:
        # By the prediction for an H200: what its arithmetic holds back asks for less.
        wanted = IN_FLIGHT * found.percent("H200") / 100
        if found.in_flight < wanted:
            said.append(f"{found.in_flight} bytes in flight a multiprocessor, of {wanted:.0f}")
        most = GOALS[kernel.backend][kernel.name][kernel.dtypes[0] == "fp32"]
        if found.instructions > most:
            said.append(f"{found.instructions:.2f} instructions an element, {most} allowed")
        share, wide = found.issue(BYTES["H100"]), kernel.dtypes[0] == "fp32"
        slower = SLOWER.get((kernel.backend, kernel.name), (ISSUE, ISSUE))[wide]
        if share > slower:
            said.append(f"issue takes {share:.2f} of the copy's time, {slower} allowed")
        allowed_mufu = 1.0 if kernel.backend == "cuda" else MUFU[kernel.name.partition(" stats")[0]]
        if found.mufu > allowed_mufu:
            said.append(f"{found.mufu:.2f} MUFU an element, {allowed_mufu} allowed")
    return [f"{kernel.backend} {kernel.name} {' '.join(kernel.dtypes)}: {s}" for s in said]


def scalar_share(V: int, dtype: str) -> float:
    """The most of a row that is not loaded in whole vectors, wherever it begins."""
    N = 16 // ITEM[dtype]
    return max((head + (V - head) % N) / V for head in range(N))


# ---- CUDA C++ -----------------------------------------------------------------------------------

MANGLED = {"f": "fp32", "NS0_4bf16E": "bf16", "NS0_3f16E": "fp16"}


def cuda_kernels(text: str) -> list[Kernel]:
    """The row kernels in what `cuobjdump -sass` prints of a build."""
    found = []
    for function in sass.functions(text):
        match = re.search(
            r"(7forward|8backward)I(f|NS0_\w+?E)(f|S3_|NS0_\w+?E)?((?:Lb[01]E)+)NS1_6Config"
            r"ILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E",
            function.name,
        )
        if match is None:
            continue
        threads, vectors, stages, blocks = map(int, match.groups()[4:])
        flags = re.findall(r"Lb([01])E", match[4])
        forward = match[1] == "7forward"
        name = match[1][1:] + " softcap" * (flags[0] == "1")
        dtype = MANGLED[match[2]]
        if forward:
            name += " stats" * (flags[1] == "1")
            dtypes, outstanding = (dtype,), vectors * stages
        else:
            dtypes = (dtype, dtype if match[3] == "S3_" else MANGLED[match[3]])
            outstanding = vectors
        in_flight = blocks * threads * outstanding * 16
        found.append(Kernel("cuda", name, dtypes, 1, function, in_flight))
    return found


def compile_cuda(csrc: Path, nvcc: str, cuobjdump: str, arch: str = "90") -> list[Kernel]:
    """The row kernels of other sources, compiled on the spot."""
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        for source in ("token_logps", "token_logps_backward"):
            cubin = f"{folder}/{source}.cubin"
            flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin"]
            command = [nvcc, *flags, "-o", cubin, str(csrc / "cuda" / f"{source}.cu")]
            subprocess.run(command, check=True, capture_output=True)
            dump = [cuobjdump, "-sass", cubin]
            text += subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    return cuda_kernels(text)


# ---- Triton -------------------------------------------------------------------------------------


def triton_kernel(name: str, text: str, warps: int, registers: int, shared: int) -> Kernel | None:
    """A kernel of `triton_aot.py` from its machine code; None where the model has no goal."""
    parts = name.split("_")
    dtypes = tuple(p for p in parts if p in ITEM)
    kind = " ".join(p for p in parts if p not in ITEM)
    if kind not in GOALS["triton"]:
        return None
    (function,) = sass.functions(text)
    reads = 2 if "kl" in kind else 1
    if "backward" in kind:  # of KL what is written stands first, if it is not the first read
        own = dtypes[0] if reads == 1 or len(dtypes) == 2 else dtypes[-2]
        written = dtypes[-1] if reads == 1 else dtypes[0]
        dtypes = (own, written) if reads == 1 else (own, dtypes[-1], written)
    threads = 32 * warps
    blocks = min(
        REGISTERS // (-(-registers // 8) * 8 * threads),
        THREADS // threads,
        SHARED // (shared + 1024),
        32,
    )
    code = function.hot or function.through
    copies = function.hot is not None and any(i.is_a("LDGSTS") for i in code.instructions)
    outstanding = shared if copies else threads * code.vectors * 16
    return Kernel("triton", kind, dtypes, reads, function, blocks * outstanding)


# ---- what is recorded ---------------------------------------------------------------------------


def record(kernels: list[Kernel]) -> dict[str, dict[str, float]]:
    """Of each kernel what docs/kernels.md says of it."""
    rows = {}
    for kernel in kernels:
        found = measure(kernel)
        rows[f"{kernel.backend} {kernel.name} {' to '.join(dict.fromkeys(kernel.dtypes))}"] = {
            "instructions": round(found.instructions, 2),
            "special": round(found.special, 2),
            "in flight KiB": found.in_flight >> 10,
            "issue H100": round(found.issue(BYTES["H100"]), 2),
            **{f"percent {device}": round(found.percent(device)) for device in BYTES},
        }
    return dict(sorted(rows.items()))


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import test_sass

    found = record(test_sass.built("90")) | test_sass.of_triton()
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found.items())]
    what = "instructions and special functions an element, sm_90; nvcc 13.0, Triton 3.9.0"
    text = ",\n".join(lines)
    RECORDED.write_text(f'{{\n "what": {json.dumps(what)},\n "kernels": {{\n{text}\n }}\n}}\n')


if __name__ == "__main__":
    main()
