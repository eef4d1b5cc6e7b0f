"""Calls drawn at random against a float64 oracle (fuzz.py); `make check-full` draws 30,000."""

import os

import fuzz
import pytest

import dpo_kernels as dk
from dpo_kernels.losses import Loss

# Interpreted, Triton takes a tenth of a second a call.
CALLS = {"torch": 1500, "cpu": 1500, "triton": 100}


@pytest.mark.parametrize("where", CALLS)
def test_calls_at_random(where):
    if where == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the calls are drawn on the CPU; with a GPU Triton takes its tensors alone")
    wrong = fuzz.failures(CALLS[where], 7, [where])
    assert not wrong, "\n".join(wrong)


def test_every_loss_is_drawn():
    import random

    import torch

    seen = set()
    for seed in range(400):
        o, _ = fuzz.draw_options(
            random.Random(seed), torch.Generator("cpu").manual_seed(seed), 2, True, True
        )
        seen.update(o["names"])
    assert seen == set(dk.losses.TABLE)


def test_the_oracle_notices(monkeypatch):
    """What it was written after: an option that leaks into the other losses of a list."""
    monkeypatch.setattr(Loss, "own", lambda row, options: options)
    assert fuzz.failures(400, 7, ["cpu"])
