"""Endpoints that fail, lie, stall or cost money: every request is accounted for."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from openai_stand_in import StandIn, certainty, longer, serving

from dpo_kernels.iterate.endpoint import Endpoint, Request
from dpo_kernels.iterate.judge_replies import load_template
from dpo_kernels.iterate.judges import PairwiseJudge
from dpo_kernels.iterate.records import PairItem
from dpo_kernels.iterate.settings import EndpointOptions
from dpo_kernels.train.config import UserError

pytest.importorskip("openai", reason="the endpoints' client: pip install dpo-kernels[judge]")

KEY = "sk-secret-0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as stand_in:
        yield stand_in


def endpoint(server: StandIn, ledger: Path | None = None, **options: Any) -> Endpoint:
    quick = {"backoff": 0.005, "max_backoff": 0.05, "request_timeout": 10.0}
    return Endpoint(
        EndpointOptions(base_url=server.url, model="judge", **{**quick, **options}), ledger
    )


def chats(n: int) -> list[Request]:
    return [Request([{"role": "user", "content": f"q{i}"}], {"seed": 0}, 8) for i in range(n)]


def accounted(asked: Endpoint) -> bool:
    s = asked.stats
    return s["requests"] == s["answered"] + s["faults"]


def items(n: int) -> list[PairItem]:
    return [PairItem(f"prompt {i}", "x" * (5 + i % 7), "y" * (4 + i % 5)) for i in range(n)]


def judge(asked: Endpoint, **options: Any) -> PairwiseJudge:
    return PairwiseJudge(
        asked, load_template(None, "pairwise", ("prompt", "first", "second")), **options
    )


def test_a_thousand_requests(server: StandIn) -> None:
    """500 pairs in both orders, 32 at once, 50 ms each: nothing lost, nothing invented."""
    server.answer, server.seconds, server.logprobs = longer, 0.05, certainty(0.9)
    asked = endpoint(server)
    began = time.perf_counter()
    verdicts = judge(asked).compare(items(500))
    took = time.perf_counter() - began
    assert len(verdicts) == 500 and not any(v.error for v in verdicts)
    assert len(server.bodies) == asked.stats["requests"] == asked.stats["answered"] == 1000
    assert 16 < server.most_under_way <= 32
    for item, v in zip(items(500), verdicts, strict=True):
        gap = len(item.first) - len(item.second)
        assert v.tie == (gap == 0)
        assert v.tie or (v.p_first > 0.5) == (gap > 0)
        assert v.tie or abs(v.p_first - (0.925 if gap > 0 else 0.075)) < 1e-9
    assert took < 15, took  # 5 s on a free machine; `make test` shares it


def test_faults_are_tried_again(server: StandIn) -> None:
    kinds, tries = ["429", "500", "cut", "malformed", "nothing", "503"], Counter[str]()

    def fault(n: int, body: dict[str, Any]) -> str:
        """Each question meets every fault, one after the other."""
        tries[str(body)] += 1
        return [*kinds, ""][tries[str(body)] - 1]

    server.answer, server.fault = longer, fault
    asked = endpoint(server, retries=len(kinds))
    verdicts = judge(asked).compare(items(30))
    assert not any(v.error for v in verdicts)
    for item, v in zip(items(30), verdicts, strict=True):
        gap = len(item.first) - len(item.second)
        assert (v.tie, v.p_first) == (gap == 0, 0.5 if gap == 0 else float(gap > 0))
    s = asked.stats
    assert accounted(asked) and s["replies"] == s["answered"] == 60
    assert s["requests"] == len(server.bodies)
    assert s["faults"] == s["retries"] == sum(n for k, n in s.items() if k.startswith("fault "))
    for kind in ("fault 429", "fault 500", "fault connection", "fault malformed"):
        assert s[kind] > 0, kind


def test_what_never_answers_is_an_error_by_name(server: StandIn) -> None:
    server.fault = lambda n, body: "500" if "q3" in body["messages"][0]["content"] else ""
    asked = endpoint(server, retries=2)
    replies = asked.ask(chats(6))
    assert [r.text for r in replies] == ["A", "A", "A", None, "A", "A"]
    assert "500" in str(replies[3].error) and "(3 tries)" in str(replies[3].error)
    assert accounted(asked) and asked.stats["requests"] == 8


def test_our_mistakes_are_not_repeated(server: StandIn) -> None:
    server.fault = lambda n, body: "400"
    asked = endpoint(server)
    assert all("400" in str(r.error) for r in asked.ask(chats(3)))
    assert asked.stats["requests"] == 3
    server.fault = lambda n, body: "401"
    refused = endpoint(server, concurrency=1)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        refused.ask(chats(50))
    assert KEY not in str(error.value)
    assert refused.stats["requests"] == 1


def test_slow_answers_end(server: StandIn) -> None:
    server.fault = lambda n, body: "slow" if n < 2 else ""
    asked = endpoint(server, request_timeout=0.3, retries=3)
    began = time.perf_counter()
    assert [r.text for r in asked.ask(chats(2))] == ["A", "A"]
    assert time.perf_counter() - began < 3
    assert asked.stats["fault timeout"] == 2 and accounted(asked)


def test_request_budget(server: StandIn, tmp_path: Path) -> None:
    """Retries count, also those of an earlier process."""
    server.fault = lambda n, body: "500" if n % 2 else ""
    asked = endpoint(server, tmp_path / "requests.jsonl", max_requests=20)
    replies = asked.ask(chats(40))
    assert len(server.bodies) == 20 == asked.stats["requests"]
    assert sum("budget: max_requests=20" in str(r.error) for r in replies) > 20
    later = endpoint(server, tmp_path / "requests.jsonl", max_requests=25)
    later.ask(chats(40))
    assert len(server.bodies) == 25


def test_cost_budget_holds_with_requests_under_way(server: StandIn) -> None:
    server.seconds = 0.02
    asked = endpoint(server, max_cost=0.01, price_in=10.0, price_out=50.0)
    replies = asked.ask(chats(300))
    assert 0 < asked.cost <= 0.01
    assert any("budget: max_cost" in str(r.error) for r in replies)
    assert asked.cost == pytest.approx(asked.stats["answered"] * (10 * 10 + 2 * 50) / 1e6)


def test_rate_limit(server: StandIn) -> None:
    asked = endpoint(server, requests_per_minute=60 * 50)
    began = time.perf_counter()
    asked.ask(chats(20))
    assert time.perf_counter() - began >= 19 / 50


def test_cache_knows_everything_that_changes_the_answer(server: StandIn, tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    endpoint(server, cache_dir=folder).ask(chats(5))
    again = endpoint(server, cache_dir=folder)
    assert [r.text for r in again.ask(chats(5))] == ["A"] * 5
    assert len(server.bodies) == 5 and again.stats["cached"] == 5
    others: list[tuple[dict[str, Any], Request]] = [
        ({}, Request(chats(1)[0].prompt, {"seed": 1}, 8)),
        ({}, Request(chats(1)[0].prompt, {"seed": 0}, 9)),
        ({"extra_body": {"top_k": 1}}, chats(1)[0]),
    ]
    for n, (options, request) in enumerate(others, start=6):
        endpoint(server, cache_dir=folder, **options).ask([request])
        assert len(server.bodies) == n
    # A line that was cut while it was written is asked for again; the rest is still known.
    file = tmp_path / "cache" / "replies.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert len(endpoint(server, cache_dir=folder).cache._found) == 7


def test_errors_are_not_cached(server: StandIn, tmp_path: Path) -> None:
    server.fault = lambda n, body: "400" if n == 0 else ""
    folder = str(tmp_path / "cache")
    assert endpoint(server, cache_dir=folder).ask(chats(1))[0].error
    assert endpoint(server, cache_dir=folder).ask(chats(1))[0].text == "A"


def test_the_key_is_in_no_file(server: StandIn, tmp_path: Path) -> None:
    """Not even where the server sends it back."""
    server.fault = lambda n, body: ["hostile", "400", ""][n % 3]
    asked = endpoint(server, tmp_path / "ledger.jsonl", cache_dir=str(tmp_path / "cache"))
    replies = asked.ask(chats(9))
    assert any("[key]" in str(r.text) for r in replies)
    assert any("[key]" in str(r.error) for r in replies)
    assert all(h["authorization"] == f"Bearer {KEY}" for h in server.headers)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()
    assert KEY not in asked.describe() and KEY not in repr(replies)


def test_no_key_in_the_address() -> None:
    for url in ("http://me:pw@host/v1", "http://host/v1?key=1", "host/v1", "ftp://host/v1"):
        with pytest.raises(UserError, match="base_url"):
            Endpoint(EndpointOptions(base_url=url, model="m"))


def test_within_a_running_loop(server: StandIn) -> None:
    """As a notebook has one."""

    async def main() -> Any:
        return endpoint(server).ask(chats(3))

    assert [r.text for r in asyncio.run(main())] == ["A"] * 3
