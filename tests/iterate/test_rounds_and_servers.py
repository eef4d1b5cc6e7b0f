"""Rounds whose judge is a server: budgets, servers that are down, judges that decide nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai_stand_in import StandIn, certainty, longer, serving
from tiny_policy import chat, save_tiny

from dpo_kernels.iterate import rounds as loop
from dpo_kernels.iterate.manifest import read_json
from dpo_kernels.iterate.records import read_table, write_table
from dpo_kernels.train.config import UserError

pytest.importorskip("transformers", reason="the loop needs transformers")
pytest.importorskip("openai", reason="the endpoints' client: pip install dpo-kernels[judge]")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def server() -> Any:
    with serving() as stand_in:
        stand_in.answer = longer
        yield stand_in


def options(folder: Path, policy: str, server: StandIn, **more: Any) -> dict[str, Any]:
    prompts = folder / "prompts.jsonl"
    write_table(prompts, [{"prompt": chat(f"Tell me about {n}.")} for n in range(8)])
    return {
        "model_name_or_path": policy,
        "prompts": str(prompts),
        "output_dir": str(folder / "run"),
        "rounds": 1,
        "num_samples": 2,
        "max_new_tokens": 5,
        "eval_fraction": 0.25,
        "eval_samples": 1,
        "min_pairs": 2,
        "device": "cpu",
        "judge": ["llm"],
        "base_url": server.url,
        "model": "judge",
        "backoff": 0.001,
        "max_backoff": 0.01,
        "retries": 1,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "save_steps": 0,
        **more,
    }


def run(given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    said: list[str] = []
    console = loop.Console(quiet=True)
    console.say = lambda text="": said.append(text)  # type: ignore[method-assign,assignment]
    return loop.Iteration(*loop.resolve(given), console).run(), "\n".join(said)


def test_a_spent_budget_waits_for_a_larger_one(
    policy: str, server: StandIn, tmp_path: Path
) -> None:
    """It ends no round for good, and nothing is asked twice."""
    # Steps that are large enough for other texts: equal ones are ties that nobody is asked about.
    far = {"max_steps": 4, "learning_rate": 0.3, "max_kl": None, "max_length_ratio": None}
    given = options(tmp_path, policy, server, concurrency=1, **far)
    for budget, stage in ((0, "judge"), (5, "judge"), (13, "evaluate")):
        summary, said = run({**given, "max_requests": budget})
        assert summary["ended"].startswith("budget: "), said
        assert "larger max_requests" in summary["ended"] and "round 1 waits" in said
        assert summary["promoted_round"] == 0 and len(server.bodies) == budget
        manifest = read_json(tmp_path / "run" / "rounds" / "001" / "manifest.json")
        assert stage not in manifest["stages"] and manifest["ended"] is None
    summary, _ = run({**given, "max_requests": 100})
    assert summary["rounds"] == 1 and not summary["ended"].startswith("budget")
    asked = [str(body) for body in server.bodies]
    assert len(set(asked)) == len(asked) > 13  # 6 pairs in both orders, and held-out ones
    rows = [r for name in ("verdicts", "wins_round0") for r in _rows(tmp_path, name)]
    assert not [r for r in rows if r["error"]]


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_table(folder / "run" / "rounds" / "001" / f"{name}.jsonl")


def test_a_server_that_is_down_ends_no_round(policy: str, server: StandIn, tmp_path: Path) -> None:
    given = options(tmp_path, policy, server)
    server.fault = lambda n, body: "503"
    with pytest.raises(UserError, match=r"answered none of 12 questions: 503.*the loop goes on"):
        run(given)
    server.fault = lambda n, body: ""
    summary, _ = run(given)
    assert summary["promoted_round"] == 1
    assert not [r for r in _rows(tmp_path, "verdicts") if r["error"]]


@pytest.mark.parametrize("letter", ["A", "C"])
def test_a_judge_that_ties_everything_is_replaced_by_the_implicit_reward(
    policy: str, server: StandIn, tmp_path: Path, letter: str
) -> None:
    """In the first round the policy is its own reference: the reward is asked without one."""
    server.answer, server.logprobs = lambda body: letter, certainty(0.9)
    summary, said = run(options(tmp_path, policy, server, fallback_judge=["implicit"]))
    assert summary["promoted_round"] == 1, summary["ended"]
    assert "the judge finds every pair a tie" in said
    assert ("6 of the ties name one position in both orders" in said) == (letter == "A")
    assert "its reward over it is 0 for every text; asked without a reference" in said
    judged = summary["each"][0]["judge"]
    assert judged["judge"] == "implicit (no reference)"
    first = judged["first_judge"]
    assert first["ties"] == first["verdicts"] == 6 and first["requests"]["answered"] == 12
    assert len(_rows(tmp_path, "verdicts_first")) == len(_rows(tmp_path, "verdicts")) == 6
    assert all(r["score_first"] < 0 for r in _rows(tmp_path, "verdicts"))  # mean log-probs
    page = (tmp_path / "run" / "report.html").read_text()
    assert "llm:judge" in page and "implicit (no reference)" in page
    # The next round's policy is no longer the starting one: its reward is over that.
    more = options(tmp_path, policy, server, fallback_judge=["implicit"], rounds=2)
    summary, said = run(more)
    assert summary["each"][1]["judge"]["judge"] == "implicit" and "without a reference" not in said


def test_held_out_prompts_are_told_by_their_text(
    policy: str, server: StandIn, tmp_path: Path
) -> None:
    """Two files that both count from 0 have ids in common, and no prompt."""
    given = options(tmp_path, policy, server)
    for name, texts in (("prompts", "abcdef"), ("eval", "fgh")):
        rows = [{"prompt": chat(f"About {t}."), "id": str(n)} for n, t in enumerate(texts)]
        write_table(tmp_path / f"{name}.jsonl", rows)
    run({**given, "eval_prompts": str(tmp_path / "eval.jsonl")})
    train = read_table(tmp_path / "run" / "prompts.jsonl")
    assert [r["id"] for r in train] == ["0", "1", "2", "3", "4"]  # "f" is held out
    assert len(read_table(tmp_path / "run" / "eval_prompts.jsonl")) == 3
