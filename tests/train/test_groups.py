"""Offsets and temperatures of data groups: planted ones are found, trained, saved, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import arguments, check, prepare
from test_cli import chats
from test_data import write
from test_train import config_of, one_thread, tiny_policy  # noqa: F401 (a fixture)

import dpo_kernels as dk
from dpo_kernels.cli import main
from dpo_kernels.data import TokenPair
from dpo_kernels.train.calibration import calibration, fit_temperature, nll
from dpo_kernels.train.config import UserError, load_config
from dpo_kernels.train.groups import Groups, one_sided
from dpo_kernels.train.metrics import read_metrics
from dpo_kernels.train.step_loss import PairLoss

# annotator -> (how sharp its judgement is, what being shown first is worth to it)
PLANTED = {"ann": (1.5, 0.9), "bob": (0.7, -0.6), "eve": (1.0, 0.5)}


def annotated(n: int, seed: int) -> tuple[torch.Tensor, list[TokenPair]]:
    """True margins [3 n] of chosen over rejected, and the pairs: "-ann" where the rejected one was
    shown first."""
    generator = torch.Generator().manual_seed(seed)
    margins: list[torch.Tensor] = []
    pairs: list[TokenPair] = []
    for name, (sharpness, bias) in PLANTED.items():
        first_over_second = 1.5 * torch.randn(n, generator=generator)
        wins = torch.rand(n, generator=generator) < torch.sigmoid(
            sharpness * first_over_second + bias
        )
        margins.append(torch.where(wins, first_over_second, -first_over_second))
        pairs += [
            TokenPair((1,), (2,), (3,), "f", group=name if win else f"-{name}")
            for win in wins.tolist()
        ]
    return torch.cat(margins), pairs


def loss_of(groups: Groups | None, margins: torch.Tensor, pairs: list[TokenPair]) -> torch.Tensor:
    beta = torch.full((len(pairs),), 0.1)
    options = {"beta": beta} if groups is None else groups.options(pairs, beta)
    zeros = torch.zeros(len(pairs))
    return dk.preference_loss(margins / 0.1, zeros, zeros, zeros, **options).loss


def test_planted_biases_and_temperatures_are_found() -> None:
    """Within 10 %; pairs that were held out are then better predicted."""
    margins, pairs = annotated(12_000, 0)
    groups = Groups.of(pairs, load_config({}).group_l2)
    assert groups.names == sorted(PLANTED) and not one_sided(pairs, False)
    assert loss_of(groups, margins, pairs) == loss_of(None, margins, pairs)  # (1, 0) at first
    optimizer = torch.optim.Adam(groups.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (loss_of(groups, margins, pairs) + groups.penalty(pairs)).backward()
        optimizer.step()
    for name, (sharpness, bias) in PLANTED.items():
        temperature, offset = groups.values()[name]
        assert temperature == pytest.approx(sharpness, rel=0.1)
        assert offset == pytest.approx(-bias, rel=0.1)  # what the bias takes from the margin
    held_out, others = annotated(4000, 1)
    with torch.no_grad():
        assert loss_of(groups, held_out, others) < loss_of(None, held_out, others) - 0.02
        options = groups.options(others, torch.ones(len(others)))
        learned = options["beta"] * held_out - options["offset"]
    assert fit_temperature(learned) == pytest.approx(1.0, rel=0.05)


def test_temperature_of_held_out_margins() -> None:
    """Margins three times too sure: the temperature says 3, and the error falls."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4000, generator=generator)
    wins = torch.rand(4000, generator=generator) < torch.sigmoid(true)
    margins = 3 * torch.where(wins, true, -true)
    found = calibration(margins.tolist())
    assert found is not None
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    assert found["ece_after"] < 0.3 * found["ece_before"] and found["ece_before"] > 0.1
    assert found["nll_after"] < found["nll_before"] == pytest.approx(nll(margins))
    assert sum(b["pairs"] for b in found["bins_before"]) == found["pairs"] == 4000
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("margins", [[2.0, 3.0], [-1.0, -2.0], [0.0, 0.0], [1e30, -1e30, 5.0]])
def test_margins_without_a_best_temperature(margins: list[float]) -> None:
    found = calibration(margins)
    assert found is not None
    json.dumps(found, allow_nan=False)
    assert calibration(margins[:1]) is None


def test_groups_change_only_their_own_pairs() -> None:
    pairs = [TokenPair((1,), (2,), (3,), "f", group=g) for g in ("a", "-a", None, "new", "-")]
    groups = Groups(["a", "-"], 0.5)
    with torch.no_grad():
        groups.tau[1] += 1
        groups.offset[1] = 0.3
    options = groups.options(pairs, torch.full((5,), 0.2))
    t = groups.temperature[1].item()
    torch.testing.assert_close(options["beta"], torch.tensor([0.2 * t, 0.2 * t, 0.2, 0.2, 0.2]))
    torch.testing.assert_close(options["offset"], torch.tensor([0.3, -0.3, 0.0, 0.0, 0.0]))
    expected = 0.5 * 2 / 5 * ((t - 1) ** 2 + 0.3**2)
    assert groups.penalty(pairs).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_them_through_the_fused_head() -> None:
    """As finite differences of the loss, in float64."""
    from dataclasses import replace

    from test_data import random_pairs
    from test_train import tiny_model

    from dpo_kernels.train.reference import PairData

    policy = tiny_policy(tiny_model(dtype=torch.float64), dtype="float64")
    pairs = [replace(p, group=g) for p, g in zip(random_pairs(3), ("a", "-a", "b"), strict=True)]
    groups = Groups.of(pairs, 0.0).double()
    config = config_of(reference_free=True)
    loss = PairLoss(policy, config, groups)

    def value() -> torch.Tensor:
        out, _ = loss(PairData(pairs), range(3), 3, 1)
        assert out.loss is not None
        return out.loss

    value().backward()
    for parameter in (groups.tau, groups.offset):
        assert parameter.grad is not None
        for i in range(2):
            sides = []
            for step in (1e-4, -2e-4):
                with torch.no_grad():
                    parameter[i] += step
                    sides.append(value().item())
            with torch.no_grad():
                parameter[i] += 1e-4
            slope = (sides[0] - sides[1]) / 2e-4
            assert parameter.grad[i].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path)
    names = ("ann", "-ann", "bob", None)
    rows = [{**row, "group": names[i % 4]} for i, row in enumerate(chats(16))]
    write(tmp_path / "pairs.jsonl", rows)
    return tmp_path


LEARN: dict[str, Any] = {"learn_groups": True, "loss_type": "sigmoid", "max_grad_norm": 0.5}


def test_they_are_logged_saved_and_resumed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert check(folder, ["in a checkpoint"], **LEARN) == []
    rows = [r for r in read_metrics(folder / "straight/metrics.jsonl") if "loss" in r]
    last = {k: v for k, v in rows[-1].items() if k.startswith("groups/")}
    assert set(last) == {
        f"groups/{g}/{k}" for g in ("ann", "bob") for k in ("temperature", "offset")
    }
    assert last["groups/ann/temperature"] != 1 and last["groups/bob/offset"] < 0
    summary = json.loads((folder / "straight/summary.json").read_text())
    assert summary["groups"]["ann"]["offset"] == last["groups/ann/offset"]
    assert summary["groups"]["ann"]["pairs"] + summary["groups"]["bob"]["pairs"] <= 12
    assert summary["calibration"]["pairs"] == 2
    assert main(arguments(folder, "again", **LEARN)) == 0
    assert "learn_groups: all rows of bob point one way" in capsys.readouterr().out


def test_what_cannot_be_learned(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="offset"):
        load_config({"learn_groups": True, "loss_type": "nca_pair"})
    write(folder / "pairs.jsonl", chats(8))
    assert main(arguments(folder, "run", **LEARN)) == 2
    said = capsys.readouterr()
    assert "no row has a `group`" in said.err
    assert "reference" not in said.out and not (folder / "run").exists()  # no pass was made for it
