"""The direction of imports, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import dpo_kernels

ROOT = Path(dpo_kernels.__file__).parent
# From the ground up: a room imports from itself and from what stands below it, nothing else.
# Rooms of one line do not know each other.
FLOORS = [
    ["version", "requirements", "inputs.checks", "inputs.transfer"],
    ["loss_options", "inputs.transform"],
    ["loss_row"],
    ["loss_values"],
    ["losses"],
    ["backends"],
    ["parallel"],
    ["ops"],
    ["inputs.layout", "inputs.arguments"],
    ["memory"],
    ["loss.from_pairs"],
    ["loss.ordinary", "listwise"],
    ["inputs.call", "inputs.shards"],
    ["inputs.linear_call", "loss.at_once"],
    ["loss.from_tokens"],
    ["loss.stream_pairs"],
    ["dpo", "linear_dpo"],
    ["modules", "unpaired"],
    ["front"],
    [""],  # the public names
    ["data", "report"],
    ["models"],
    ["verification"],
    ["train", "integrations", "bench"],
    ["iterate", "verify"],
    ["doctor"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
# What stands above the public names takes the functions and classes from there.
PUBLIC = {
    "",
    "version",
    "requirements",
    "losses",
    "loss_options",
    "backends",
    "memory",
    "parallel",
    "inputs.transfer",
}
SPLIT = {"inputs", "loss"}  # rooms whose files stand on different floors
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """`ops.plan` -> `ops`; `inputs.call` -> `inputs.call`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in SPLIT and len(parts) > 1 else parts[0]


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Rooms of the package that a file imports, wherever the import stands."""
    package = ["dpo_kernels", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != "dpo_kernels" or parts[1:] == ["_C"]:
                continue
            while parts and ".".join(parts[1:]) not in known:
                parts.pop()  # a name of a module, not a module
            rooms.add(room_of(".".join(parts[1:])))
    return rooms


def test_imports_flow_one_way():
    """Every file stands on a floor, and imports point down: no circle, no exception."""
    known = modules()
    for module, path in known.items():
        room = room_of(module)
        if room in SPLIT:  # a folder's empty __init__
            continue
        assert room in LEVEL, f"{path.relative_to(ROOT)} stands on no floor"
        for other in imports_of(path, known) - {room}:
            assert other not in SPLIT, f"{path.relative_to(ROOT)} imports the folder {other}"
            assert LEVEL[other] < LEVEL[room], f"{path.relative_to(ROOT)} imports {other}"


def test_what_stands_above_the_front_uses_the_public_names():
    known = modules()
    for module, path in known.items():
        room = room_of(module)
        if LEVEL.get(room, 0) > LEVEL[""]:
            below = {r for r in imports_of(path, known) if LEVEL[r] < LEVEL[""]}
            extra = below - PUBLIC
            assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_no_two_files_of_one_name():
    """Of one name are `__init__` and, as the house has it, an op and its kernels."""
    ops = {path.stem for path in (ROOT / "ops").glob("*.py")}
    seen: dict[str, Path] = {}
    for path in ROOT.rglob("*.py"):
        if path.stem == "__init__" or (path.parent.name == "triton" and path.stem in ops):
            continue
        assert path.stem not in seen, f"{path} and {seen[path.stem]}"
        seen[path.stem] = path


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_light():
    loaded = run(
        "import torch, sys; before = set(sys.modules); import dpo_kernels;"
        "print(' '.join(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    ).split()
    assert not {"triton", "transformers", "matplotlib", "tqdm"} & set(loaded), loaded


def test_import_is_quick():
    # Not a benchmark: a bound with much room, to notice a heavy import.
    seconds = min(
        float(
            run(
                "import torch, time; t = time.perf_counter(); import dpo_kernels;"
                "print(time.perf_counter() - t)"
            )
        )
        for _ in range(3)
    )
    assert seconds < 1.5, seconds
