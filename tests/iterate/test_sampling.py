"""`generate`: samples of a model here and of a server, their seeds and log-probs, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_stand_in import serving
from tiny_policy import chat, save_tiny

from dpo_kernels.cli import main
from dpo_kernels.iterate.local_models import LocalModel, prompt_ids, render
from dpo_kernels.iterate.records import Journal, Prompt, read_samples, read_table, write_table
from dpo_kernels.iterate.sampling import generate
from dpo_kernels.iterate.settings import SamplingOptions

pytest.importorskip("transformers", reason="sampling in process needs transformers")

PROMPTS = [Prompt(chat(f"Describe the harbor {'very ' * i}well."), f"p{i}") for i in range(5)]
HOW = SamplingOptions(num_samples=2, max_new_tokens=6, sample_batch_size=4, seed=3)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return LocalModel.load(save_tiny(tmp_path_factory.mktemp("policy")), "cpu")


def test_samples_and_their_logps(policy: LocalModel, tmp_path: Path) -> None:
    """The log-probs kept are the model's own, before temperature and nucleus."""
    how = SamplingOptions(**{**vars(HOW), "temperature": 0.7, "top_p": 0.9})
    file = tmp_path / "samples.jsonl"
    counts = generate(PROMPTS, policy, how, file)
    samples = read_samples(file)
    assert (counts.samples, counts.errors, len(samples)) == (10, 0, 10)
    assert [(s.id, s.sample) for s in samples] == [(p.id, n) for p in PROMPTS for n in (0, 1)]
    assert not list(tmp_path.glob("*.part"))
    for s in samples:
        ids = prompt_ids(policy.tokenizer, s.prompt)
        logits = policy.model(torch.tensor([ids + s.token_ids])).logits[0].log_softmax(-1)
        wanted = [logits[len(ids) - 1 + t, token].item() for t, token in enumerate(s.token_ids)]
        assert s.logps == pytest.approx(wanted, abs=2e-5)
        assert s.finish_reason in ("stop", "length") and s.temperature == 0.7


def test_padding_and_batches_change_no_greedy_sample(policy: LocalModel, tmp_path: Path) -> None:
    texts = []
    for size in (1, 10):
        how = SamplingOptions(
            num_samples=1, temperature=0.0, max_new_tokens=6, sample_batch_size=size
        )
        generate(PROMPTS, policy, how, tmp_path / "g.jsonl")
        texts.append([s.completion for s in read_samples(tmp_path / "g.jsonl")])
    assert texts[0] == texts[1]


def test_static_cache_draws_the_same(policy: LocalModel, tmp_path: Path) -> None:
    found = []
    for static in (False, True):
        how = SamplingOptions(**{**vars(HOW), "static_cache": static})
        generate(PROMPTS, policy, how, tmp_path / "s.jsonl")
        found.append([s.completion for s in read_samples(tmp_path / "s.jsonl")])
    assert found[0] == found[1]


def test_a_run_that_was_cut_draws_what_it_would_have(
    policy: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    generate(PROMPTS, policy, HOW, whole)
    add, calls = Journal.add, []

    def stop_at_the_third(self: Journal, rows: Any) -> None:
        calls.append(rows)
        if len(calls) == 3:
            self._file.write(b'{"half of a l')
            raise KeyboardInterrupt
        add(self, rows)

    monkeypatch.setattr(Journal, "add", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        generate(PROMPTS, policy, HOW, cut)
    monkeypatch.undo()
    drawn: list[int] = []
    sample = LocalModel.sample

    def counted(self: LocalModel, prompts: Any, options: Any) -> Any:
        drawn.append(len(prompts))
        return sample(self, prompts, options)

    monkeypatch.setattr(LocalModel, "sample", counted)
    assert not cut.exists()
    generate(PROMPTS, policy, HOW, cut)
    assert drawn == [2]  # of three batches two were there
    assert cut.read_bytes() == whole.read_bytes()


def test_stop_texts(policy: LocalModel, tmp_path: Path) -> None:
    first = SamplingOptions(num_samples=1, temperature=0.0, max_new_tokens=6)
    generate(PROMPTS[:1], policy, first, tmp_path / "a.jsonl")
    (sample,) = read_samples(tmp_path / "a.jsonl")
    end = sample.completion[2:4]
    how = SamplingOptions(num_samples=1, temperature=0.0, max_new_tokens=6, stop=[end])
    generate(PROMPTS[:1], policy, how, tmp_path / "b.jsonl")
    (cut,) = read_samples(tmp_path / "b.jsonl")
    assert cut.completion == sample.completion[: sample.completion.index(end)]
    assert cut.finish_reason == "stop" and len(cut.logps) == len(cut.token_ids) <= 6


def test_render(policy: LocalModel) -> None:
    prompt = chat("Hello.")
    alone, answer = render(policy.tokenizer, prompt, "An answer.")
    assert alone == prompt_ids(policy.tokenizer, prompt)
    assert policy.tokenizer.decode(answer) == "An answer.<|im_end|>"


def test_from_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="the endpoints' client: pip install dpo-kernels[judge]")
    rows = [{"prompt": chat("one")}, {"prompt": "two", "id": "second"}, {"prompt": chat("one")}]
    write_table(tmp_path / "prompts.jsonl", rows)
    with serving() as server:
        server.answer = lambda body: f"s{body['seed']}"
        server.fault = lambda n, body: "400" if body.get("prompt") and n % 2 else ""
        server.logprobs = lambda body, text: {"content": [{"token": "s", "logprob": -0.5}]}
        command = [
            "generate",
            "--prompts",
            str(tmp_path / "prompts.jsonl"),
            "--base_url",
            server.url,
            "--output",
            str(tmp_path / "out.jsonl"),
            "--model",
            "m",
            "--num_samples",
            "3",
            "--stop",
            "END",
            "--concurrency",
            "1",
            "--temperature",
            "0.5",
        ]
        assert main(command) == 1  # some samples are missing, and it says so
        bodies = server.bodies
    out = capsys.readouterr().out
    assert "samples are missing; the first error: 400" in out
    samples = read_samples(tmp_path / "out.jsonl")
    assert {s.completion for s in samples} == {f"s{s.seed}" for s in samples}
    assert len({s.seed for s in samples}) == len(samples)
    assert all(b["stop"] == ["END"] and b["temperature"] == 0.5 for b in bodies)
    assert {"messages" in b for b in bodies} == {True, False}
    assert samples[0].logps == [-0.5]


def test_what_a_server_left_out_is_asked_for_alone(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the endpoints' client: pip install dpo-kernels[judge]")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    write_table(prompts, [{"prompt": f"p{i}"} for i in range(4)])
    with serving() as server:
        server.answer = lambda body: f"{body['model']} {body['prompt']}"
        server.fault = lambda n, body: "400" if n in (1, 4) else ""
        command = ["generate", "--prompts", str(prompts), "--output", str(out)]
        command += ["--base_url", server.url, "--num_samples", "2", "--concurrency", "1"]
        assert main([*command, "--model", "m"]) == 1 and len(read_samples(out)) == 6
        assert main([*command, "--model", "m"]) == 0 and len(read_samples(out)) == 8
        assert len(server.bodies) == 8 + 2
        assert not list(tmp_path.glob("*.part"))
        # Another model on that server has samples of its own.
        server.fault = lambda n, body: "400" if n == 10 else ""
        assert main([*command, "--model", "m"]) == 1
        assert main([*command, "--model", "other"]) == 0
        assert {s.completion.split()[0] for s in read_samples(out)} == {"other"}


def test_bad_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.jsonl"
    for text, message in (("", "no prompt"), ('{"prompt": 1}\n', "row 1: prompt"), ("{", "JSON")):
        file.write_text(text)
        args = ["--prompts", str(file), "--output", str(tmp_path / "o"), "--base_url", "http://x/"]
        assert main(["generate", *args, "--model", "m"]) == 2
        assert message in capsys.readouterr().err
    assert main(["generate", "--prompts", str(file), "--output", "o"]) == 2
    assert "model_name_or_path" in capsys.readouterr().err


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    rows = [{"prompt": chat("one"), "completion": "x", "sample": 0, "logps": [0.5]}]
    write_table(tmp_path / "a.parquet", rows)
    assert read_table(tmp_path / "a.parquet") == rows


def test_a_journal_survives_any_cut(tmp_path: Path) -> None:
    rows = [{"n": i, "text": "ä" * i} for i in range(4)]
    file = tmp_path / "j"
    journal = Journal(file)
    journal.add(rows)
    journal.close()
    content = file.read_bytes()
    for n in range(len(content) + 1):
        file.write_bytes(content[:n])
        journal = Journal(file)
        kept = len(journal.rows)
        journal.add([{"n": "new"}])
        journal.close()
        assert journal.rows == [*rows[:kept], {"n": "new"}]
        assert [json.loads(line) for line in file.read_text().splitlines()] == journal.rows
