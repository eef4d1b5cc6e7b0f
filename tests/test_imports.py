"""The direction of imports, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import dpo_kernels

ROOT = Path(dpo_kernels.__file__).parent
# the front functions, as the rooms above them see them
FRONT = {"", "backends", "losses", "memory", "version", "dpo", "linear", "pairs"}
# room -> what it may import from the package, besides itself
RULES = {
    "checks": set(),
    "loss_options": {"checks"},
    "losses": {"checks", "loss_options"},
    "transform": {"checks"},
    "version": set(),
    "requirements": set(),
    # ops: the layout of a term, in pair_loss
    "backends": {"requirements", "losses", "transform", "_C", "ops", "transfer"},
    "ops": {"backends", "losses", "transform", "checks"},
    "arguments": {"ops", "backends", "transform", "checks"},
    "layout": {"checks", "transfer"},
    "transfer": set(),
    "memory": {"ops", "backends", "checks"},
    "pairs": {"ops", "losses", "checks"},
    "ordinary": {"ops", "losses", "layout", "pairs", "transform", "checks"},
    "call": {"ops", "losses", "ordinary", "arguments", "transform"},
    "tokens": {
        "ops",
        "losses",
        "layout",
        "pairs",
        "ordinary",
        "call",
        "backends",
        "transform",
        "checks",
    },
    "dpo": {
        "ops",
        "ordinary",
        "call",
        "transform",
        "layout",
        "pairs",
        "backends",
        "tokens",
        "checks",
        "arguments",
    },
    "stream": {"ops", "transform", "layout", "pairs", "ordinary", "backends", "tokens", "transfer"},
    "linear": {
        "ops",
        "call",
        "transform",
        "layout",
        "pairs",
        "backends",
        "tokens",
        "stream",
        "checks",
        "arguments",
    },
    "modules": {"dpo", "linear", "pairs", "losses", "checks", "arguments"},
    "data": {"transfer"},
    "models": FRONT | {"data"},
}


def imports_of(path: Path) -> set[str]:
    """Rooms of the package that a file imports."""
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
            if parts[0] == "dpo_kernels":
                rooms.add(parts[1] if len(parts) > 1 else "")
    return rooms


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_imports_flow_one_way():
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        if room in RULES:
            extra = imports_of(path) - RULES[room] - {room}
            assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_training_uses_the_front_functions_only():
    public = FRONT | set(dpo_kernels.__all__)
    rooms = {
        "train",
        "data",
        "bench",
        "models",
        "transfer",
        "doctor",
        "requirements",
        "verification",
        "cli",
    }
    files = [path for name in ("train", "bench") for path in (ROOT / name).rglob("*.py")]
    for path in [*files, ROOT / "cli.py"]:
        extra = imports_of(path) - public - rooms
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"
    for path in (ROOT / "integrations").rglob("*.py"):
        extra = imports_of(path) - public - {"integrations", "models", "data"}
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


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
