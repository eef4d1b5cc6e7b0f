"""The same cases over NCCL, where there are two GPUs. They have not been run: there were none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_cases import SAME
from test_many_ranks import check_gradients, check_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs"),
]
NAMES = ("full_shard", "tied", "replicas", "budget", "coupled", "labelled", "vocabulary", "saved")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, a GPU each."""
    where = tmp_path_factory.mktemp("gpus")
    here = {"RANK_DEVICE": "cuda", "PYTHONPATH": str(Path(__file__).parents[2])}
    for world in (1, 2):
        script = Path(__file__).with_name("rank_cases.py")
        call = [sys.executable, script, where, str(world), *NAMES]
        subprocess.run(call, env={**os.environ, **here}, check=True, timeout=600)
        said = json.loads((where / f"results-{world}.json").read_text())
        assert not [name for entry in said for name in entry if "error" in entry[name]], said
    return where


@pytest.mark.parametrize("name", [name for name in NAMES if name in SAME])
def test_two_gpus_are_one(folder: Path, name: str) -> None:
    run, alone = folder / f"{name}-2", folder / f"{name}-1"
    check_same(run, alone, 1e-4, 1e-3)
    check_gradients(run, alone, 1e-3)


def test_checkpoints_are_in_shards(folder: Path) -> None:
    assert len(list((folder / "saved-2/checkpoints/step-2").glob("*.distcp"))) == 2
