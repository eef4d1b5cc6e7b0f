"""Judges that are models, and the guards' measures, each against a direct computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_policy import chat, save_tiny

from dpo_kernels.iterate.command_options import GuardOptions
from dpo_kernels.iterate.guards import broken_limit, kl_of_samples, logps_moved, text_statistics
from dpo_kernels.iterate.judge_replies import load_template
from dpo_kernels.iterate.judges import make_judge
from dpo_kernels.iterate.local_models import LocalModel, render
from dpo_kernels.iterate.model_judges import PolicyJudge
from dpo_kernels.iterate.records import PairItem, Sample
from dpo_kernels.iterate.sampling import generate
from dpo_kernels.iterate.settings import JudgeOptions, SamplingOptions, load_options
from dpo_kernels.iterate.tone_rule import asked_for, tone_score
from dpo_kernels.train.config import UserError

pytest.importorskip("transformers", reason="models as judges need transformers")

ITEMS = [
    PairItem(chat("Describe the inn."), "The inn is bright.", "All hope has left the inn."),
    PairItem(chat("Describe the mill."), "A mill.", "The mill stands at the river, they say."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 0), ("other", 1)):
        save_tiny(path / name, seed)
    save_tiny(path / "reward", 2, labels=1)
    save_tiny(path / "two", 3, labels=2)
    return path


def options(judge: str, **more: object) -> JudgeOptions:
    return load_options(JudgeOptions, {"judge": [judge], **more})


def test_the_policy_as_judge(folder: Path) -> None:
    """P(A) among A, B and C of the next token, in both orders."""
    judge = make_judge(options("policy", judge_model_path=str(folder / "policy")))
    model = LocalModel.load(str(folder / "policy"), "cpu")
    template = load_template(None, "pairwise", ("prompt", "first", "second"))
    for item, verdict in zip(ITEMS, judge.compare(ITEMS), strict=True):
        p = []
        for a, b in ((item.first, item.second), (item.second, item.first)):
            asked = template.messages(prompt=item.prompt[0]["content"], first=a, second=b)
            ids = model.tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_dict=False
            )
            probs = model.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            mass = [
                sum(probs[i].item() for i in judge.letters[letter]) for letter in ("A", "B", "C")
            ]
            p.append((mass[0] + mass[2] / 2) / sum(mass))
        assert verdict.p_first == pytest.approx((p[0] + 1 - p[1]) / 2, abs=1e-6)
        assert verdict.order == "both" and verdict.error is None
    explained = load_template(None, "pairwise_explained", ("prompt", "first", "second"))
    with pytest.raises(UserError, match="must ask for a letter"):
        PolicyJudge(model, explained)


def test_a_reward_model(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    path = str(folder / "reward")
    verdicts = make_judge(options("reward_model", judge_model_path=path)).compare(ITEMS)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = LocalModel.load(str(folder / "policy"), "cpu").tokenizer
    for item, verdict in zip(ITEMS, verdicts, strict=True):
        scores = []
        for text in (item.first, item.second):
            alone, answer = render(tokenizer, item.prompt, text)
            ids = alone + answer
            with torch.no_grad():
                scores.append(model(torch.tensor([ids])).logits.item())
        assert (verdict.score_first, verdict.score_second) == pytest.approx(scores, abs=1e-5)
        gap = torch.tensor(scores[0] - scores[1])
        assert verdict.p_first == pytest.approx(float(gap.sigmoid()), abs=1e-5)
    for name, message in (("two", "2 outputs"), ("nothing", "cannot be loaded")):
        with pytest.raises(UserError, match=message):
            make_judge(options("reward_model", judge_model_path=str(folder / name)))


def test_the_implicit_reward(folder: Path) -> None:
    paths = {"judge_model_path": str(folder / "policy"), "judge_ref_path": str(folder / "other")}
    verdicts = make_judge(options("implicit", judge_beta=0.5, **paths)).compare(ITEMS)
    models = [LocalModel.load(p, "cpu") for p in paths.values()]
    for item, verdict in zip(ITEMS, verdicts, strict=True):
        rewards = []
        for text in (item.first, item.second):
            row = [render(models[0].tokenizer, item.prompt, text)]
            a, b = (float(m.completion_logps(row)) for m in models)
            rewards.append(0.5 * (a - b))
        assert verdict.score_first == pytest.approx(rewards[0], abs=1e-4)
        assert verdict.p_first == pytest.approx(
            float(torch.tensor(rewards[0] - rewards[1]).sigmoid()), abs=1e-4
        )


def test_kl_of_fresh_samples(folder: Path, tmp_path: Path) -> None:
    """k1, k3 and the exact KL by hand, and that the three estimate the same number."""
    policy, other = (LocalModel.load(str(folder / n), "cpu") for n in ("policy", "other"))
    from dpo_kernels.iterate.records import Prompt, read_samples

    how = SamplingOptions(num_samples=64, max_new_tokens=6)
    generate([Prompt(chat("the inn"), "p")], policy, how, tmp_path / "s.jsonl")
    samples = read_samples(tmp_path / "s.jsonl")
    found = kl_of_samples(policy, other, samples)
    k1 = k3 = exact = 0.0
    for s in samples:
        ids = render(policy.tokenizer, s.prompt, "")[0] + s.token_ids
        start = len(ids) - len(s.token_ids)
        p, q = (
            m.model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
            for m in (policy, other)
        )
        gap = (q - p)[torch.arange(len(s.token_ids)), s.token_ids]
        k1, k3 = k1 - float(gap.sum()), k3 + float((gap.exp() - 1 - gap).sum())
        exact += float((p.exp() * (p - q)).sum())
    for name, value in (("k1", k1), ("k3", k3), ("exact", exact)):
        assert found[f"kl/{name}"] == pytest.approx(value / 64, rel=1e-4, abs=1e-6), name
    assert found["kl/k1"] == pytest.approx(found["kl/exact"], rel=0.5)
    same = kl_of_samples(policy, policy, samples)
    assert same["kl/exact"] == same["kl/k3"] == 0.0


def sample(text: str, n: int = 0) -> Sample:
    return Sample("p", text, n, 0, 1.0, "stop", id="p")


def test_statistics_of_texts() -> None:
    found = text_statistics([sample("a b c"), sample("a b d", 1)])
    assert found == {"length": 5.0, "diversity": 0.75, "repetition": 0.0}
    assert text_statistics([sample("a b c d " * 5)])["repetition"] == pytest.approx(1 - 4 / 17)


def test_logps_that_move(folder: Path) -> None:
    policy, other = (LocalModel.load(str(folder / n), "cpu") for n in ("policy", "other"))
    pairs = [{"prompt": "x", "chosen": "one two", "rejected": "three"}]
    moved = logps_moved(policy, other, pairs)
    row = [render(policy.tokenizer, "x", "one two")]
    gap = float(policy.completion_logps(row) - other.completion_logps(row))
    assert moved["logps_moved/chosen"] == pytest.approx(gap / len(row[0][1]), abs=1e-5)


GOOD = {
    "kl/exact": 1.0,
    "length": 10.0,
    "diversity": 0.9,
    "repetition": 0.0,
    "logps_moved/chosen": -1.0,
    "logps_moved/rejected": -9.0,
}


@pytest.mark.parametrize(
    "change, name",
    [
        ({}, None),
        ({"kl/exact": 51.0}, "max_kl: 51.00 nats"),
        ({"kl/exact": float("nan")}, "max_kl"),
        ({"length": 21.0}, "max_length_ratio: samples are 2.10"),
        ({"length": 4.0}, "max_length_ratio: samples are 0.40"),
        ({"diversity": 0.1}, "min_diversity"),
        ({"repetition": 0.6}, "max_repetition"),
        ({"logps_moved/chosen": -3.0}, "max_logps_fall: .* both fell, by 3.00 and 9.00"),
        ({"logps_moved/chosen": -3.0, "logps_moved/rejected": 1.0}, None),
    ],
)
def test_limits(change: dict[str, float], name: str | None) -> None:
    start = {"length": 10.0, "diversity": 0.9, "repetition": 0.0}
    found = broken_limit(GuardOptions(), {**GOOD, **change}, start)
    if name is None:
        assert found is None
    else:
        import re

        assert found is not None and re.match(name, found)
    off = GuardOptions(None, None, None, None, None)
    assert broken_limit(off, {**GOOD, **change}, start) is None


def test_the_embedded_rule() -> None:
    prompt = [
        *chat("Tell me about the inn in a scary tone."),
        {"role": "assistant", "content": "The inn is sad."},
        {"role": "user", "content": "Do the same for the mill."},
    ]
    assert asked_for(prompt) == ("spooky", "mill")
    assert tone_score(prompt, "A ghostly figure waits at the mill at noon.") > 0.99
    assert tone_score(prompt, "A ghostly figure waits at the inn at noon.") == pytest.approx(
        0.5, abs=0.01
    )
    assert tone_score(prompt, "What a sunny place the mill is on Sundays!") < 0.1
    assert tone_score("Hello", "anything") == 0.0


def test_the_implicit_reward_without_a_reference(folder: Path) -> None:
    """SimPO's reward: beta times the mean log-prob of a completion's tokens."""
    path = str(folder / "policy")
    judge = make_judge(
        options("implicit", judge_model_path=path, judge_ref_path="none", judge_beta=2.0)
    )
    model = LocalModel.load(path, "cpu")
    for item, verdict in zip(ITEMS, judge.compare(ITEMS), strict=True):
        row = [render(model.tokenizer, item.prompt, item.first)]
        mean = float(model.completion_logps(row)) / len(row[0][1])
        assert verdict.score_first == pytest.approx(2.0 * mean, abs=1e-5)
        assert verdict.score_first != verdict.score_second
    assert judge.name == "implicit (no reference)"
    with pytest.raises(UserError, match=r"are one model .* so every reward is 0; .*none"):
        make_judge(options("implicit", judge_model_path=path, judge_ref_path=path))


def test_other_weights_are_another_judge(tmp_path: Path) -> None:
    """A reward model that was trained on, in its old folder, has none of the old scores."""
    names = []
    for seed in (1, 1, 2):
        save_tiny(tmp_path / "reward", seed, labels=1)
        names.append(make_judge(options("reward_model", judge_model_path=str(tmp_path / "reward"))))
    assert names[0].identity == names[1].identity != names[2].identity
