"""The loop: stages, resuming after kill -9 at each, why rounds end, references, guards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import killed_rounds
import pytest
import torch
from tiny_policy import chat, save_tiny

from dpo_kernels.cli import main
from dpo_kernels.iterate import manifest
from dpo_kernels.iterate import rounds as loop
from dpo_kernels.iterate.command_options import IterateConfig
from dpo_kernels.iterate.local_models import LocalModel
from dpo_kernels.iterate.manifest import read_json
from dpo_kernels.iterate.records import read_samples, read_table, write_table
from dpo_kernels.iterate.settings import load_options
from dpo_kernels.train.config import UserError

pytest.importorskip("transformers", reason="the loop needs transformers")

RULE = """
from pathlib import Path

LOG = Path(__file__).parent / "asked.log"

def score(prompt, completion):
    with LOG.open("a") as file:
        file.write(repr((prompt, completion)) + "\\n")
    return completion.count("e") - completion.count("a")
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("policy"))


def options(folder: Path, policy: str, **more: Any) -> dict[str, Any]:
    """A loop of two rounds that takes a second or two."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_table(prompts, [{"prompt": chat(f"Tell me about the {w}.")} for w in WORDS])
    return {
        "model_name_or_path": policy,
        "prompts": str(prompts),
        "output_dir": str(folder / "run"),
        "rounds": 2,
        "num_samples": 3,
        "max_new_tokens": 5,
        "sample_batch_size": 6,
        "eval_fraction": 0.3,
        "eval_samples": 1,
        "min_pairs": 2,
        "device": "cpu",
        "judge": ["regex"],
        "judge_pattern": "e",
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "save_steps": 1,
        **more,
    }


WORDS = [
    "harbor",
    "garden",
    "library",
    "station",
    "market",
    "bakery",
    "bridge",
    "park",
    "school",
    "theater",
]


@pytest.fixture
def rule(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "rule.py"
    file.write_text(RULE)
    return {"judge": ["callable"], "judge_callable": f"{file}:score"}


def files_of(run: Path) -> dict[str, bytes]:
    names = ("samples", "verdicts", "pairs", "eval_samples", "wins_round0", "wins_previous")
    return {
        str(f.relative_to(run)): f.read_bytes()
        for f in sorted(run.rglob("*.jsonl"))
        if f.stem in names
    }


POINTS = [
    ("journal samples", 3),
    ("journal scores", 2),
    ("journal verdicts", 4),
    ("table pairs.jsonl", 1),
    ("step", 2),
    ("manifest train", 1),  # trained, and does not say so yet
    ("journal wins_round0", 2),
    ("manifest evaluate", 1),
    ("manifest promote promoted", 1),
    ("step", 1),  # of the second round
]


def test_killed_at_every_stage(policy: str, tmp_path: Path, rule: dict[str, Any]) -> None:
    """kill -9: no text is judged twice, no pair is lost, the final weights are the same."""
    whole = options(tmp_path / "whole", policy, **rule)
    assert killed_rounds.run(whole) == 0
    asked = tmp_path / "asked.log"
    wanted = sorted(asked.read_text().splitlines())
    assert len(set(wanted)) == len(wanted)
    asked.unlink()
    cut = options(tmp_path / "cut", policy, **rule)
    for point, nth in POINTS:
        code = killed_rounds.run(cut, point, nth)
        assert code == -9, (point, nth, code)
    assert killed_rounds.run(cut) == 0
    texts = asked.read_text().splitlines()
    # Being killed between a score and its line in the file costs that score: once here.
    assert sorted(set(texts)) == wanted and len(texts) <= len(wanted) + 1
    first, second = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    assert files_of(first) == files_of(second)
    a, b = (read_json(run / "summary.json") for run in (first, second))
    assert a["weights"] == b["weights"] and a["promoted_round"] == b["promoted_round"] == 2
    assert not list(second.rglob("*.part")) and not list(second.rglob("*.writing"))
    last = read_json(second / "rounds" / "002" / "manifest.json")
    assert list(last["stages"]) == [
        "generate",
        "judge",
        "pairs",
        "train",
        "evaluate",
        "promote",
    ]
    # Finished, it does nothing more; its report is there.
    assert killed_rounds.run(cut, "step", 1) == 0
    assert killed_rounds.run(cut, "compare", 1) == 0
    assert "samples" not in read_json(second / "summary.json")["ended"]
    assert "Held-out prompts" in (second / "report.html").read_text()
    assert (second / "rounds.png").stat().st_size > 1000


def test_a_changed_file_or_setting_is_refused(policy: str, tmp_path: Path) -> None:
    given = options(tmp_path, policy, rounds=1)
    summary = loop.run_iteration(given)
    assert summary["promoted_round"] == 1
    with pytest.raises(UserError, match=r"learning_rate is 0.5.*began with 0.01"):
        loop.run_iteration({**given, "learning_rate": 0.5})
    with pytest.raises(UserError, match="judge_pattern"):
        loop.run_iteration({**given, "judge_pattern": "a"})
    assert loop.run_iteration({**given, "rounds": 2})["promoted_round"] == 2  # may grow
    file = tmp_path / "run" / "rounds" / "002" / "manifest.json"
    content = read_json(file)
    del content["stages"]["evaluate"], content["stages"]["promote"]
    file.write_text(json.dumps({**content, "promoted": False}))
    pairs = tmp_path / "run" / "rounds" / "002" / "pairs.jsonl"
    pairs.write_text(pairs.read_text() + "\n")
    with pytest.raises(UserError, match=r"pairs.jsonl is not what the finished stage 'pairs'"):
        loop.run_iteration({**given, "rounds": 2})


def test_a_judge_that_ties_everything_ends_by_name(policy: str, tmp_path: Path) -> None:
    said: list[str] = []
    console = loop.Console(quiet=True)
    console.say = said.append  # type: ignore[method-assign,assignment]
    given = options(tmp_path, policy, judge_pattern="no such text")
    iteration = loop.Iteration(*loop.resolve(given), console)
    summary = iteration.run()
    assert summary["ended"].startswith("min_pairs: 0 pairs in round 1, min_pairs is 2")
    assert summary["promoted_round"] == 0
    assert any("the judge finds every pair a tie" in line for line in said)
    assert read_json(tmp_path / "run" / "rounds" / "001" / "manifest.json")["ended"]
    assert (Path(summary["model"]) / "model.safetensors").exists()  # the starting policy


def test_a_fallback_judge(policy: str, tmp_path: Path) -> None:
    """Where everything is a tie the round trains on what another judge says: here a DPO model's
    implicit reward."""
    other = save_tiny(tmp_path / "other", seed=1)
    given = options(
        tmp_path,
        policy,
        judge_pattern="no such text",
        fallback_judge=["implicit"],
        rounds=1,
        judge_model_path=other,
        judge_ref_path=policy,
    )
    summary = loop.run_iteration(given)
    assert summary["promoted_round"] == 1
    judged = summary["each"][0]["judge"]
    assert judged["judge"] == "implicit" and judged["first_judge"]["ties"] > 0
    assert "asked in its place, implicit" in judged["said"]


@pytest.mark.parametrize(
    "limit, value",
    [("max_kl", 1e-9), ("max_length_ratio", 1.0), ("min_diversity", 1e9), ("max_repetition", -1)],
)
def test_guards_stop_and_say_why(policy: str, tmp_path: Path, limit: str, value: float) -> None:
    given = options(tmp_path, policy)
    config = load_options(IterateConfig, loop.split_options(given)[0])
    setattr(config, limit, value)
    summary = loop.Iteration(config, loop.split_options(given)[1], loop.Console(True)).run()
    assert summary["ended"].startswith(f"guard {limit}: ")
    assert "limit" in summary["ended"] and "round 1 is not promoted" in summary["ended"]
    assert summary["promoted_round"] == 0 and len(summary["each"]) == 1


def test_stop_rules(policy: str, tmp_path: Path) -> None:
    reached = loop.run_iteration(options(tmp_path / "a", policy, stop_at=0.01))
    assert reached["ended"].startswith("stop_at: ") and reached["promoted_round"] == 1
    below = loop.run_iteration(options(tmp_path / "b", policy, stop_below=1.0, rounds=1))
    assert below["ended"].startswith(("stop_below: ", "rounds: "))


@pytest.mark.parametrize("reference", ["initial", "ema"])
def test_references(policy: str, tmp_path: Path, reference: str) -> None:
    given = options(tmp_path, policy, reference=reference, ema_decay=0.25)
    summary = loop.run_iteration(given)
    assert summary["promoted_round"] == 2
    manifests = [
        read_json(tmp_path / "run" / "rounds" / f"00{n}" / "manifest.json") for n in (1, 2)
    ]
    if reference == "initial":
        assert [m["reference_of_training"] for m in manifests] == [policy, policy]
    else:
        mean = str(tmp_path / "run" / "rounds" / "001" / "reference")
        assert [m["reference_of_training"] for m in manifests] == [policy, mean]


def test_the_mean_of_two_models(policy: str, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    loop.average_models(Path(policy), Path(other), tmp_path / "mean", 0.25)
    weights = [
        LocalModel.load(str(p), "cpu").model.lm_head.weight
        for p in (policy, other, tmp_path / "mean")
    ]
    assert torch.allclose(weights[2], 0.25 * weights[0] + 0.75 * weights[1], atol=1e-6)


def test_online_pairs_come_from_the_current_policy(policy: str, tmp_path: Path) -> None:
    given = options(tmp_path, policy, online=1, rounds=3, prompts_per_round=None)
    del given["max_steps"]
    summary = loop.run_iteration(given)
    assert summary["rounds"] == 3
    each = [tmp_path / "run" / "rounds" / f"00{n}" for n in (1, 2, 3)]
    manifests = [read_json(e / "manifest.json") for e in each]
    assert [m["stages"]["train"]["steps"] for m in manifests] == [1, 1, 1]
    assert len({m["sampled_from"]["weights"] for m in manifests}) == 3
    prompts = [{s.id for s in read_samples(e / "samples.jsonl")} for e in each]
    assert all(len(p) == 4 for p in prompts) and prompts[0] != prompts[1]


def test_a_promptless_round_has_held_out_prompts_apart(policy: str, tmp_path: Path) -> None:
    loop.run_iteration(options(tmp_path, policy, rounds=1))
    train = {r["id"] for r in read_table(tmp_path / "run" / "prompts.jsonl")}
    held = {r["id"] for r in read_table(tmp_path / "run" / "eval_prompts.jsonl")}
    assert len(held) == 3 and len(train) == 7 and not train & held


def test_mistakes(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(tmp_path, policy)
    flags = {
        "--rounds 0": "rounds must be at least 1",
        "--reference best": "reference",
        "--beta x": "beta",
        "--dataset_name f": "dataset_name",
        "--judge llm": "judge llm needs --base_url",
        "--ema_decay 1": "ema_decay must be in [0, 1)",
    }
    base = [a for k, v in given.items() if k != "judge" for a in (f"--{k}", str(v))]
    for flag, message in flags.items():
        assert main(["iterate", *base, *flag.split()]) == 2, flag
        assert message in capsys.readouterr().err
    assert main(["iterate", "--prompts", "p"]) == 2
    assert "model_name_or_path and prompts" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    assert main(["iterate", *base, "--judge", "regex"]) == 2
    assert "no iteration's folder" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    assert main(["iterate", *base, "--judge", "regex", "--print_config"]) == 0
    assert "judge_pattern: e" in capsys.readouterr().out


def test_two_processes_in_one_folder(policy: str, tmp_path: Path) -> None:
    given = options(tmp_path, policy)
    (tmp_path / "run").mkdir()
    with manifest.locked(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        loop.run_iteration(given)


def test_a_rule_that_always_fails_ends_no_round(policy: str, tmp_path: Path) -> None:
    """It is mended, and the loop goes on; a file that cannot be loaded is one line too."""
    file = tmp_path / "rule.py"
    rule = {"judge": ["callable"], "judge_callable": f"{file}:score", "rounds": 1}
    given = options(tmp_path, policy, **rule)
    for text, message in (
        ("def score(p:", "cannot be loaded: SyntaxError"),
        ("1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("score = 3", "is 3, expected a function"),
        ("def score(p, c): return float('nan')", "erred on each of .* the rule gave nan"),
        ("def score(p, c): raise KeyError('x')", "erred on each of .* KeyError: 'x'; called again"),
    ):
        file.write_text(text + "\n")
        with pytest.raises(UserError, match=message):
            loop.run_iteration(given)
    file.write_text("def score(p, c): return c.count('e') - c.count('a')\n")
    assert loop.run_iteration(given)["promoted_round"] == 1
