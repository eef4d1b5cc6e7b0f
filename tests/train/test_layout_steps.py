"""An optimizer step is a fixed list of pairs: layout, budget and batches change nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data import random_pairs
from test_train import config_of, tiny_model, tiny_policy

from dpo_kernels.models import layout_check
from dpo_kernels.models.versions import transformers_before
from dpo_kernels.train.config import UserError, load_config
from dpo_kernels.train.console import Console
from dpo_kernels.train.loop import train
from dpo_kernels.train.metrics import MetricsFile
from dpo_kernels.train.reference import with_reference
from dpo_kernels.train.step_batches import batches_of

SEGMENTS = pytest.mark.skipif(
    transformers_before(4, 55), reason="transformers before 4.55 takes padded rows"
)


def rows_of(folder: Path, said: list[str] | None = None, **options: Any) -> list[dict[str, Any]]:
    """Metrics of three steps of four pairs."""
    say = print if said is None else said.append
    policy = tiny_policy(say=say, max_steps=3, **options)
    config = config_of(max_steps=3, **options)
    quiet = Console(quiet=True)
    data = with_reference(policy, random_pairs(9), config, quiet, "pairs")
    metrics = MetricsFile(folder / "metrics.jsonl")
    train(policy, data, None, config, metrics, quiet)
    return metrics.rows


def assert_same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-6), key


@pytest.mark.parametrize("layout", ["padded", "packed", "shared", "auto"])
@pytest.mark.parametrize("budget", [None, 30, 1])
def test_layout_and_budget_change_nothing(tmp_path: Path, layout: str, budget: int | None) -> None:
    if layout != "padded" and transformers_before(4, 55):
        pytest.skip("transformers before 4.55 takes padded rows")
    expected = rows_of(tmp_path, layout="padded", sft_weight=0.5)
    found = rows_of(tmp_path, layout=layout, max_tokens_per_batch=budget, sft_weight=0.5)
    assert_same(expected, found)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "aot"},
        {"loss_type": "aot_unpaired"},
        {"loss_type": "beta_dpo"},
        {"loss_type": ["sigmoid", "aot"], "loss_weights": [1.0, 0.5]},
        {"loss_type": "aot", "sft_weight": 0.3},
    ],
)
@pytest.mark.parametrize(
    "batches",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"max_tokens_per_batch": 30},
    ],
)
def test_losses_that_couple_pairs_see_the_whole_step(
    tmp_path: Path, options: dict[str, Any], batches: dict[str, Any]
) -> None:
    """Sorted, or scaled by the mean margin, over the step, not over each of its batches."""
    assert_same(rows_of(tmp_path, **options), rows_of(tmp_path, **options, **batches))


def test_a_budget_counts_what_the_layout_runs() -> None:
    pairs = random_pairs(9)
    for layout in ("padded", "shared"):
        if layout == "shared" and transformers_before(4, 55):
            continue
        config = config_of(layout=layout, max_tokens_per_batch=40)
        policy = tiny_policy(layout=layout, check_layout=False)
        policy.sharing = policy.sharing.__class__(layout, 0.0, None)
        for part in batches_of(list(range(9)), pairs, config, policy):
            batch = policy.batch([pairs[i] for i in part])
            if len(part) > 1 and layout == "shared":
                assert batch.trunk_tokens <= 40


@SEGMENTS
def test_the_run_says_what_is_saved(tmp_path: Path) -> None:
    said: list[str] = []
    rows_of(tmp_path, said, layout="shared")
    line = next(text for text in said if text.startswith("layout shared"))
    assert "x fewer expected" in line and "x faster measured" in line
    said.clear()
    rows_of(tmp_path, said, layout="shared", check_layout=False)
    assert not said


@SEGMENTS
def test_a_first_batch_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` goes back to padded rows before the reference is computed; a layout by name stops."""
    expected = rows_of(tmp_path, layout="padded")
    monkeypatch.setattr(layout_check, "_problem", lambda *_: "log-probs differ")
    said: list[str] = []
    assert_same(expected, rows_of(tmp_path, said, layout="auto"))
    assert any("padded rows, because on the first batch log-probs differ" in s for s in said)
    with pytest.raises(UserError, match=r"layout=packed: log-probs differ .*check_layout=False"):
        rows_of(tmp_path, layout="packed")


def test_a_routers_loss_takes_no_budget() -> None:
    model = tiny_model("Mixtral", num_local_experts=4, router_aux_loss_coef=0.1)
    with pytest.raises(UserError, match=r"max_tokens_per_batch.*load-balancing"):
        tiny_policy(model, max_tokens_per_batch=100)


def test_older_names() -> None:
    assert load_config({"batch_layout": "prefix"}).layout == "shared"
    assert load_config({"layout": "packed"}).layout == "packed"


def test_the_order_is_of_seed_and_epoch_alone() -> None:
    pairs = random_pairs(9)
    policy = tiny_policy(layout="padded")
    config = config_of(layout="padded", max_tokens_per_batch=50)
    first, second = (batches_of([5, 2, 8, 0, 3], pairs, config, policy) for _ in range(2))
    assert first == second and sorted(i for part in first for i in part) == [0, 2, 3, 5, 8]
