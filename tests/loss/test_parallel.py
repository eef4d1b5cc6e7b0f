"""A head sharded over 2 and 4 processes against the whole one: one spawn a world size.

The checks are in `parallel_ranks.py`, which every process runs, and `parallel_costs.py`.
"""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dpo_kernels

ROOT = Path(dpo_kernels.__file__).parent.parent
SCRIPT = Path(__file__).parent / "parallel_ranks.py"
CHECKS = [
    node.name
    for file in (SCRIPT.with_name("parallel_costs.py"), SCRIPT)
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef)
    and any(isinstance(d, ast.Name) and d.id == "check" for d in node.decorator_list)
]
SECONDS = 900  # for a world that hangs; a busy machine takes minutes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{world: what each rank found}, each world spawned when it is first asked for."""
    found = {}

    def of(world):
        if world not in found:
            found[world] = spawn(world, tmp_path_factory.mktemp(f"world{world}"))
        return found[world]

    return of


def spawn(world, folder):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    ranks = []
    for rank in range(world):
        log = (folder / f"log{rank}").open("w")
        command = [sys.executable, SCRIPT, str(rank), str(world), folder / "store"]
        ranks.append(
            subprocess.Popen(
                [*command, folder / f"{rank}.json"], env=environment, stdout=log, stderr=log
            )
        )
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and any(p.poll() is None for p in ranks):
        time.sleep(0.1)
    for process in ranks:
        process.kill()
        process.wait()
    found = []
    for rank in range(world):
        path = folder / f"{rank}.json"
        told = json.loads(path.read_text()) if path.exists() else {}
        found.append((told, (folder / f"log{rank}").read_text()[-2000:]))
    return found


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_head(results, world, check):
    for rank, (told, log) in enumerate(results(world)):
        assert check in told, f"rank {rank} did not come to this check: {told} {log}"
        assert not told[check], f"rank {rank}: {told[check]}"
