"""Servers that answer, but not what was asked for; keys that would find their way into a file."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from openai_stand_in import StandIn, longer, serving

from dpo_kernels.cli import main
from dpo_kernels.iterate.endpoint import Endpoint, Reply, Request, _seconds
from dpo_kernels.iterate.judge_replies import read_pairwise, read_score
from dpo_kernels.iterate.judges import make_judge
from dpo_kernels.iterate.records import PairItem, read_table, write_table
from dpo_kernels.iterate.settings import EndpointOptions, JudgeOptions, load_options
from dpo_kernels.train.config import UserError

pytest.importorskip("openai", reason="the endpoints' client: pip install dpo-kernels[judge]")

KEY = "sk-secret/0123456789"
QUICK: dict[str, Any] = {"backoff": 0.002, "max_backoff": 0.02, "retries": 2}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as stand_in:
        yield stand_in


def endpoint(server: StandIn, ledger: Path | None = None, **options: Any) -> Endpoint:
    return Endpoint(
        EndpointOptions(base_url=server.url, model="judge", **{**QUICK, **options}), ledger
    )


def chats(n: int) -> list[Request]:
    return [Request([{"role": "user", "content": f"q{i}"}], {"seed": 0}, 8) for i in range(n)]


def body_of(choice: Any, **more: Any) -> bytes:
    return json.dumps({"id": "same", "choices": [choice], **more}).encode()


def message(content: Any, reason: Any = "stop") -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content}, "finish_reason": reason}


LIES: dict[str, tuple[bytes, str, int]] = {  # body, the error, requests
    "html": (b"<!doctype html><title>Sign in</title>", "malformed: no completion", 3),
    "nothing": (b"", "malformed", 3),
    "no choice": (b'{"choices": []}', "malformed", 3),
    "choices no list": (b'{"choices": "A"}', "malformed", 3),
    "an error inside a 200": (b'{"error": {"message": "overloaded"}}', "malformed", 3),
    "null": (b"null", "malformed", 3),
    "not utf-8": (b"\xff\xfe{}", "malformed", 3),
    "nested": (b'{"choices": ' + b"[" * 100_000, "malformed", 3),
    "null content": (body_of(message(None)), "no text in the reply", 1),
    "content in parts": (body_of(message([{"type": "text", "text": "A"}])), "no text", 1),
    "a number": (body_of(message(1)), "no text", 1),
    "filtered": (body_of(message(None, "content_filter")), "'content_filter'", 1),
}


@pytest.mark.parametrize("name", LIES)
def test_what_is_no_completion_is_an_error(server: StandIn, name: str) -> None:
    body, error, requests = LIES[name]
    server.sends = lambda n, _: (200, {}, body)
    asked = endpoint(server)
    (reply,) = asked.ask(chats(1))
    assert reply.text is None and error in str(reply.error)
    s = asked.stats
    assert s["requests"] == len(server.bodies) == requests == s["answered"] + s["faults"]


def test_odd_numbers_are_not_believed(server: StandIn) -> None:
    """Log-probs, usage and ids of no meaning: the text counts, and nothing else."""
    found = {"content": [{"token": "A", "logprob": float("nan"), "top_logprobs": [{"token": "A"}]}]}
    usage = {"prompt_tokens": float("nan"), "completion_tokens": -3}
    content = body_of({**message("A"), "logprobs": found}, usage=usage, created=float("inf"))
    server.sends = lambda n, body: (200, {}, content)
    asked = endpoint(server, max_cost=1.0, price_in=1.0, price_out=1.0)
    replies = asked.ask(chats(4))
    assert [r.text for r in replies] == ["A"] * 4 and replies[0].logprobs is None
    assert asked.stats["without_usage"] == 4 and asked.stats["tokens_in"] == 0
    assert 0 < asked.cost < 1.0  # what was set aside


def test_a_body_that_stops_is_tried_again(server: StandIn) -> None:
    server.fault = lambda n, body: "chunk" if n < 2 else ""
    asked = endpoint(server)
    assert asked.ask(chats(1))[0].text == "A"
    assert asked.stats["fault connection"] == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(server: StandIn, status: int) -> None:
    """It would take texts (and, on one host, the key) to an address that nobody gave."""
    with serving() as other:
        to = {"Location": other.url + "/chat/completions"}
        server.sends = lambda n, body: (status, to, b"")
        asked = endpoint(server, concurrency=1)
        with pytest.raises(UserError, match="base_url: .* redirects to " + other.url):
            asked.ask(chats(5))
        assert len(server.bodies) == 1 and not other.bodies


@pytest.mark.parametrize("status, hint", [(401, "is OPENAI_API_KEY set"), (403, "is"), (404, "no")])
def test_a_refusal_ends_the_command(server: StandIn, status: int, hint: str) -> None:
    content = json.dumps({"error": {"message": f"no model 'judge' for {KEY}"}}).encode()
    server.sends = lambda n, body: (status, {}, content)
    asked = endpoint(server, concurrency=1)
    with pytest.raises(UserError, match=f"refuses: .*{status}.*{hint}") as error:
        asked.ask(chats(5))
    assert len(server.bodies) == 1 and KEY not in str(error.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_too_long_a_context_is_an_error_of_its_own(server: StandIn, status: int) -> None:
    said = b'{"error": {"message": "maximum context length is 8", "code": "context_length"}}'
    server.sends = lambda n, body: (status, {}, said) if n == 1 else None
    asked = endpoint(server, concurrency=1)
    replies = asked.ask(chats(3))
    assert [r.text for r in replies] == ["A", None, "A"] and len(server.bodies) == 3
    assert "maximum context length" in str(replies[1].error)


def test_retry_after_may_be_a_date(server: StandIn) -> None:
    later = formatdate(time.time() + 60, usegmt=True)
    assert 55 < _seconds({"retry-after": later}) <= 60
    for text in ("", "soon", formatdate(0, usegmt=True), "-1", "nan", "inf", "Mon, 99 Foo"):
        assert _seconds({"retry-after": text}) == 0.0, text
    limit = b'{"error": {"message": "slow down"}}'
    server.sends = lambda n, body: (429, {"Retry-After": later}, limit) if n == 0 else None
    asked = endpoint(server, max_backoff=0.2)
    began = time.perf_counter()
    assert asked.ask(chats(1))[0].text == "A"
    assert time.perf_counter() - began >= 0.2  # honoured as far as max_backoff


def test_the_key_comes_back_in_disguise(server: StandIn, tmp_path: Path) -> None:
    """Escaped, behind a long text that is cut, in a token, as a field's name."""
    escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)
    said = [body_of(message("KEY")).decode().replace("KEY", escaped)]
    said.append(said[0].replace(escaped, KEY.replace("/", "\\/")))
    found = {"content": [{"token": KEY, "logprob": -0.1, "top_logprobs": []}]}
    said.append(body_of({**message("A"), "logprobs": found}).decode())
    said.append(body_of(message("A"), **{KEY: 1}).decode())
    long = json.dumps({"error": {"message": "x" * 145 + KEY}})  # its line is cut at 200 characters
    server.sends = lambda n, body: (
        (400, {}, long.encode()) if n == 4 else (200, {}, said[n].encode())
    )
    asked = endpoint(server, tmp_path / "l.jsonl", cache_dir=str(tmp_path / "c"), concurrency=1)
    replies = asked.ask(chats(5))
    assert [r.text for r in replies] == ["[key]", "[key]", "A", "A", None]
    (tmp_path / "replies.json").write_text(json.dumps([vars(r) for r in replies]))
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY[:9].encode() not in file.read_bytes(), file


def test_a_key_with_a_line_end(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    assert endpoint(server).ask(chats(1))[0].text == "A"
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    for bad in (KEY + "\nx", "sk secret 01234", "clé-secrète-1"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(UserError, match="OPENAI_API_KEY holds") as error:
            endpoint(server)
        assert bad not in str(error.value)


@pytest.mark.parametrize("word", ["EMPTY", "none", "x", ""])
def test_a_word_in_place_of_a_key_stays_in_texts(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", word)
    server.answer = lambda body: f"an {word or 'empty'} answer: {word}"
    assert endpoint(server).ask(chats(1))[0].text == f"an {word or 'empty'} answer: {word}"


def test_a_request_is_spent_before_it_is_sent(server: StandIn, tmp_path: Path) -> None:
    """Killed while requests are under way, a process has spent them."""
    ledger, seen = tmp_path / "requests.jsonl", []
    server.sends = lambda n, body: seen.append(ledger.read_text().count('"sent": 1'))
    endpoint(server, ledger, concurrency=1, price_in=1.0, max_cost=1.0).ask(chats(3))
    assert seen == [1, 2, 3]
    again = endpoint(server, ledger, max_requests=4)
    again.ask(chats(3))
    assert len(server.bodies) == 4 and again.cost > 0
    assert endpoint(server, ledger, max_requests=0).ask(chats(1))[0].error is not None
    assert len(server.bodies) == 4


def test_cut_by_a_filter_or_of_another_scale(server: StandIn) -> None:
    assert "filter" in str(read_pairwise(Reply("A", None, "content_filter"), False).error)
    assert "filter" in str(read_score(Reply("7", None, "content_filter"), 1, 10)[1])
    assert read_score(Reply("4/5", None, "stop"), 1, 10)[0] is None  # no 4 of 10
    assert read_score(Reply("4/5", None, "stop"), 1, 5)[0] == 4.0


def test_all_that_changes_a_verdict_names_the_judge(server: StandIn, tmp_path: Path) -> None:
    """A journal of verdicts is gone on with by the same judge alone."""
    given: dict[str, Any] = {"base_url": server.url, "model": "m"}
    for name, others in (
        ("llm", [{"extra_body": {"top_k": 1}}, {"judge_max_tokens": 3}, {"judge_seed": 1}]),
        ("rubric", [{"extra_body": {"top_k": 1}}, {"judge_max_tokens": 3}, {"judge_highest": 5.0}]),
    ):
        judges = [
            make_judge(load_options(JudgeOptions, {**given, "judge": [name], **more}))
            for more in ({}, {}, {"concurrency": 2}, *others)
        ]
        names = [j.identity for j in judges]
        assert names[0] == names[1] == names[2] and len(set(names)) == 1 + len(others)
    rule = tmp_path / "rule.py"
    found = []
    for text in ("return 1", "return 1", "return 2"):
        rule.write_text(f"def score(prompt, completion): {text}\n")
        options = {"judge": ["callable"], "judge_callable": f"{rule}:score"}
        judge = make_judge(load_options(JudgeOptions, options))
        found.append((judge.identity, judge.compare([PairItem("p", "a", "b")])[0].score_first))
    assert found[0] == found[1] != found[2] and [score for _, score in found] == [1, 1, 2]


def test_a_thousand_with_every_fault(server: StandIn) -> None:
    """Each answer is the question's own, whatever came between."""
    kinds = ["", "429", "", "cut", "", "500", "", "chunk", "", "malformed"]
    server.fault = lambda n, body: kinds[n % 10] if n < 600 else ""
    server.answer = longer
    judge = make_judge(
        load_options(
            JudgeOptions,
            {"judge": ["llm"], "base_url": server.url, "model": "m", **QUICK, "retries": 30},
        )
    )
    items = [PairItem(f"p{i}", "x" * (1 + i % 9), "y" * (1 + i % 7)) for i in range(150)]
    verdicts = judge.compare(items)
    for item, v in zip(items, verdicts, strict=True):
        gap = len(item.first) - len(item.second)
        assert v.p_first == (0.5 if gap == 0 else float(gap > 0)), v
    s = judge.endpoint.stats
    assert s["requests"] == len(server.bodies) == s["answered"] + s["faults"]
    assert s["replies"] == 300


def test_a_judge_command_that_was_cut_asks_for_the_rest(server: StandIn, tmp_path: Path) -> None:
    samples, out = tmp_path / "samples.jsonl", tmp_path / "verdicts.jsonl"
    texts = [{"prompt": f"p{i}", "completion": "x" * (n + 1)} for i in range(20) for n in (0, 1)]
    write_table(samples, [{**row, "sample": n % 2} for n, row in enumerate(texts)])
    server.answer = longer
    server.sends = lambda n, body: (401, {}, b"{}") if n == 25 else None
    command = ["judge", "--samples", str(samples), "--output", str(out), "--judge", "llm"]
    command += ["--base_url", server.url, "--model", "m", "--concurrency", "1"]
    assert main(command) == 2 and not out.exists()
    assert main(command) == 0 and len(server.bodies) == 41
    assert len(read_table(out)) == 20
    assert {f.name for f in tmp_path.iterdir()} == {"samples.jsonl", "verdicts.jsonl"}
    server.answer = lambda body: "neither"
    assert main([*command, "--concurrency", "9"]) == 1  # there is no verdict but errors
