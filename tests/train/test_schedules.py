"""`lr_scheduler_kwargs`: what a schedule takes besides the steps, checked before anything loads."""

from pathlib import Path

import pytest
import torch
from test_cli import refused, run

from dpo_kernels.train.config import DPOTrainConfig, UserError, load_config
from dpo_kernels.train.config_files import read_config_file
from dpo_kernels.train.optim import check_schedule, make_schedule
from dpo_kernels.train.run_options import SCHEDULES

pytest.importorskip("transformers", reason="the trainer needs transformers")

# What each schedule takes, with values that change it.
TAKES = {
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 0.05, "power": 2.0},
    "inverse_sqrt": {"timescale": 4},
    "cosine_with_min_lr": {"min_lr_rate": 0.5},
    "warmup_stable_decay": {"num_decay_steps": 4, "decay_type": "linear"},
}
NEEDED = ("cosine_with_min_lr", "warmup_stable_decay")


def rates(config: DPOTrainConfig, steps: int = 12) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = make_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_schedule_takes_reaches_it(name: str) -> None:
    config = load_config({"lr_scheduler_type": name, "learning_rate": 0.1, "warmup_steps": 2})
    if name in NEEDED:
        with pytest.raises(UserError, match="lr_scheduler_kwargs"):
            check_schedule(config)
    else:
        check_schedule(config)
        plain = rates(config)
    if name not in TAKES:
        with pytest.raises(UserError, match=f"'power' is not of {name}: it takes nothing"):
            check_schedule(
                load_config({"lr_scheduler_type": name, "lr_scheduler_kwargs": {"power": 2}})
            )
        return
    more = load_config(
        {
            "lr_scheduler_type": name,
            "learning_rate": 0.1,
            "warmup_steps": 2,
            "lr_scheduler_kwargs": TAKES[name],
        }
    )
    check_schedule(more)
    assert name in NEEDED or rates(more) != plain
    assert min(rates(more)[2:]) >= (0.05 if name == "cosine_with_min_lr" else 0.0) - 1e-9


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr_scheduler_kwargs": {"num_cycle": 2}}, "did you mean 'num_cycles'"),
        ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs="),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
            "must be smaller than initial lr",
        ),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_loads(given: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_schedule(load_config({"lr_scheduler_type": "cosine", "learning_rate": 0.1, **given}))


def test_on_the_command_line_and_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lr_scheduler_type", "cosine", "--print_config", "--lr-scheduler-kwargs")
    assert run("train", *options, '{"num_cycles": 2}') == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert read_config_file(str(file))["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert load_config(read_config_file(str(file))).lr_scheduler_kwargs == {"num_cycles": 2}
    assert load_config({"lr_scheduler_kwargs": "{}"}).lr_scheduler_kwargs is None
    assert "invalid JSON value" in refused(capsys, "train", *options, "{num")
    assert "must be names and values" in refused(capsys, "train", *options, "[1]")
    other = ("--model_name_or_path", "x", "--dataset_name", "y", "--lr_scheduler_kwargs")
    assert "'b' is not of linear" in refused(capsys, "train", *other, '{"b": 1}')
    assert "'b' is not of linear" in refused(capsys, "sft", *other, '{"b": 1}')
    assert "'b' is not of linear" in refused(capsys, "train", "--dry_run", *other, '{"b": 1}')
