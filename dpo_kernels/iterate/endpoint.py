"""An OpenAI-compatible server that may fail, lie, stall or cost money.

Every request ends in one `Reply`: an answer, or an error that says why there is none. Faults of the
server (429, 5xx, cut connections, bodies that are no JSON, silence) are tried again, with back-off
and jitter; a mistake of ours (400) is not. Each request sent is counted once, with what became of
it: `stats["requests"] = stats["answered"] + stats["faults"]`. Budgets are taken before sending.

The key comes from the environment, goes into the client's header and nowhere else: it is cut out of
whatever the server sends back, also where it comes escaped. Redirects are not followed: they would
carry the texts to an address that nobody gave, uncounted.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ..train.config_files import UserError
from ..train.ranks import ALONE, Ranks
from .records import digest
from .reply_cache import Reply, ReplyCache, Request
from .settings import EndpointOptions
from .spending import Purse

MAX_BODY = 8 * 2**20  # bytes of a reply
SECRET = 8  # characters from which a key is one
RETRIED = (408, 409, 425, 429)
FATAL = (401, 403, 404)  # no other request will fare better


class _Fault(Exception):
    """One attempt that failed; `again`: another may not."""

    def __init__(self, kind: str, message: str, again: bool, after: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.again, self.after = kind, again, after


class Endpoint:
    """Asks many requests at once, within the limits of its options."""

    def __init__(
        self, options: EndpointOptions, ledger: Path | None = None, ranks: Ranks = ALONE
    ) -> None:
        """`ledger`: a file in which what was spent is kept, so that a budget outlives a process.

        The limits are those of all `ranks`: each has its part of the requests under way and of
        those sent a minute, and budgets are shared.
        """
        if not options.base_url or not options.model:
            raise UserError("base_url and model are needed to ask a server")
        url = urlsplit(options.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"base_url must be an http(s) address, got {options.base_url!r}")
        if url.username or url.password or url.query:
            raise UserError("base_url holds a password or a query; a key comes from api_key_env")
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UserError(
                "a server is asked through the openai client: pip install 'dpo-kernels[judge]'"
            ) from None
        if options.concurrency < ranks.world:
            raise UserError(
                f"concurrency: {options.concurrency} requests at once are fewer than the "
                f"{ranks.world} processes that ask"
            )
        self.options, self.ranks = options, ranks
        self._key = _key_of(options.api_key_env)
        self._shapes = _shapes_of(self._key)
        self.cache = ReplyCache(options.cache_dir, ranks)
        self.stats: Counter[str] = Counter()
        self.purse = Purse(ledger, ranks)
        self._jitter = random.Random()
        self._fatal = self.first_error = ""

    # --- the public part ---

    def ask(
        self,
        requests: Sequence[Request],
        done: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """A reply for each request, in order; `done` hears of each as it comes.

        Raises `UserError` where the server refuses the key or knows no such model.
        """
        if not requests:
            return []
        replies: list[Reply | None] = [None] * len(requests)

        def keep(i: int, reply: Reply) -> None:
            self.ranks.at("requests to the server")
            replies[i] = reply
            self.stats["errors" if reply.error else "replies"] += 1
            self.first_error = self.first_error or reply.error or ""
            if done is not None:
                done(i, reply)

        self._run(self._ask_all(requests, keep))
        if self._fatal:
            raise UserError(self._fatal)
        return [reply for reply in replies if reply is not None]

    def key_of(self, request: Request) -> str:
        """The hash of everything that changes the answer."""
        return digest([self.options.base_url, self._path(request), self._body(request)])

    @property
    def cost(self) -> float:
        """Paid so far, by this process and in earlier runs."""
        return self.purse.before + self.purse.spent

    def counted(self) -> tuple[Counter[str], float]:
        """(the counts, the cost) of all ranks, each of which calls this."""
        every = self.ranks.objects((dict(self.stats), self.purse.spent))
        stats: Counter[str] = Counter()
        for found, _ in every:
            stats.update(found)
        return stats, self.purse.before + sum(spent for _, spent in every)

    def describe(self, stats: Counter[str] | None = None, cost: float | None = None) -> str:
        """The counts in one line: of this process, or those that are given."""
        s, cost = stats or self.stats, self.cost if cost is None else cost
        kinds = ", ".join(f"{n} {k[6:]}" for k, n in sorted(s.items()) if k.startswith("fault "))
        return (
            f"{s['requests']} requests: {s['answered']} answered, {s['faults']} faults"
            f"{f' ({kinds})' if kinds else ''}; {s['cached']} replies from the cache, "
            f"{s['errors']} without an answer; {s['tokens_in']} + {s['tokens_out']} tokens"
            + (f", cost {cost:.4f}" if cost else "")
        )

    # --- one request ---

    def _path(self, request: Request) -> str:
        return "completions" if isinstance(request.prompt, str) else "chat/completions"

    def _body(self, request: Request) -> dict[str, Any]:
        what = "prompt" if isinstance(request.prompt, str) else "messages"
        return {
            "model": self.options.model,
            what: request.prompt,
            self.options.max_tokens_field: request.max_tokens,
            **request.options,
            **(self.options.extra_body or {}),
        }

    def _run(self, work: Any) -> None:
        """Run to the end, also where an event loop runs already (a notebook)."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(work)
            return
        failed: list[BaseException] = []

        def apart() -> None:
            try:
                asyncio.run(work)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=apart)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    async def _ask_all(
        self, requests: Sequence[Request], keep: Callable[[int, Reply], None]
    ) -> None:
        import openai

        self._open_at = 0.0  # the loop's time before which nothing is sent
        self._slot = 0.0
        todo = iter(enumerate(requests))
        async with openai.AsyncOpenAI(
            base_url=self.options.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self.options.request_timeout,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        ) as client:

            async def work() -> None:
                for i, request in todo:  # one iterator: each request goes to one worker
                    keep(i, await self._reply(client, request))

            workers = [
                asyncio.ensure_future(work()) for _ in range(min(self._at_once, len(requests)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _reply(self, client: Any, request: Request) -> Reply:
        key = self.key_of(request)
        known = self.cache.get(key)
        if known is not None:
            self.stats["cached"] += 1
            return known
        attempt = 0
        while True:
            await self._turn()
            if self._fatal:
                return Reply(None, "not sent: the server refuses every request")
            refused, reserve = self._take(request)
            if refused:
                self.stats["over_budget"] += 1
                return Reply(None, refused)
            cost = reserve
            try:
                reply, cost = await self._attempt(client, request, reserve)
                self.stats["answered"] += 1
            except _Fault as fault:
                cost = 0.0 if fault.kind.isdigit() else reserve  # a refusal is not billed
                self.stats["faults"] += 1
                self.stats[f"fault {fault.kind}"] += 1
                attempt += 1
                if fault.again and attempt <= self.options.retries:
                    self.stats["retries"] += 1
                    await self._wait(attempt, fault)
                    continue
                tries = f" ({attempt} tries)" if attempt > 1 else ""
                return Reply(None, self._clean(f"{fault.kind}: {fault}{tries}"))
            finally:
                self.purse.settle(reserve, cost)
            if reply.text is not None:
                self.cache.put(key, reply)
            return reply

    async def _turn(self) -> None:
        """Wait for the rate limit, and for the pause that a 429 asked for."""
        loop = asyncio.get_running_loop()
        at = self._open_at
        if self.options.requests_per_minute:
            at = self._slot = max(self._slot, self._open_at, loop.time())
            self._slot += 60 * self.ranks.world / self.options.requests_per_minute
        while (left := max(at, self._open_at) - loop.time()) > 0:
            await asyncio.sleep(left)

    async def _wait(self, attempt: int, fault: _Fault) -> None:
        most = self.options.max_backoff
        delay = min(self.options.backoff * 2 ** (attempt - 1), most)
        delay *= self._jitter.uniform(0.5, 1.5)
        if fault.after:  # the server says when: for everybody
            until = asyncio.get_running_loop().time() + min(fault.after, most)
            self._open_at = max(self._open_at, until)
        await asyncio.sleep(delay)

    def _take(self, request: Request) -> tuple[str, float]:
        """(why not, or nothing; the cost set aside): both budgets are kept with requests in flight.

        A text has no more tokens than bytes, save for what a chat template puts around it.
        """
        o = self.options
        size = len(json.dumps(request.prompt, ensure_ascii=False).encode("utf-8", "replace")) + 256
        reserve = (size * o.price_in + request.max_tokens * o.price_out) / 1e6
        refused = self.purse.take(o, reserve)
        if refused:
            return refused, 0.0
        self.stats["requests"] += 1
        return "", reserve

    @property
    def _at_once(self) -> int:
        """This rank's part of the requests that are under way at once."""
        whole, rest = divmod(self.options.concurrency, self.ranks.world)
        return whole + (self.ranks.rank < rest)

    async def _attempt(self, client: Any, request: Request, reserve: float) -> tuple[Reply, float]:
        try:
            body = await asyncio.wait_for(self._send(client, request), self.options.request_timeout)
        except _Fault:
            raise
        except (asyncio.TimeoutError, TimeoutError):
            limit = self.options.request_timeout
            raise _Fault("timeout", f"no answer within {limit:g} s", True) from None
        except Exception as error:
            raise self._fault_of(error) from None
        reply, usage = self._read(body)
        sent, received = usage or (None, None)
        self.stats["tokens_in"] += sent or 0
        self.stats["tokens_out"] += received or 0
        if usage is None:
            self.stats["without_usage"] += 1
            return reply, reserve
        o = self.options
        return reply, (usage[0] * o.price_in + usage[1] * o.price_out) / 1e6

    async def _send(self, client: Any, request: Request) -> bytes:
        """The body of the answer, whatever it holds, up to `MAX_BODY`."""
        body = self._body(request)
        call: dict[str, Any] = {"model": body.pop("model")}
        if "messages" in body:
            api, call["messages"] = client.chat.completions, body.pop("messages")
        else:
            api, call["prompt"] = client.completions, body.pop("prompt")
        parts, size = [], 0
        async with api.with_streaming_response.create(**call, extra_body=body) as response:
            async for part in response.iter_bytes():
                size += len(part)
                if size > MAX_BODY:
                    raise _Fault("malformed", f"a body of more than {MAX_BODY} bytes", False)
                parts.append(part)
        return b"".join(parts)

    def _fault_of(self, error: Exception) -> _Fault:
        import openai

        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            said = self._clean(" ".join(str(error).split()))[:200]
            if status in FATAL:
                hint = f" (is {self.options.api_key_env} set?)" if status != 404 else ""
                self._fatal = f"{self.options.base_url} refuses: {said}{hint}"
            if 300 <= status < 400:
                where = self._clean(error.response.headers.get("location", "nowhere"))[:200]
                self._fatal = (
                    f"base_url: {self.options.base_url} redirects to {where}; give the address "
                    "that answers"
                )
            again = status in RETRIED or status >= 500
            return _Fault(str(status), said, again, _seconds(error.response.headers))
        if isinstance(error, openai.APITimeoutError):
            return _Fault("timeout", "no answer in time", True)
        return _Fault("connection", self._clean(f"{type(error).__name__}: {error}")[:200], True)

    def _read(self, body: bytes) -> tuple[Reply, tuple[int, int] | None]:
        """The reply in a body, and its (tokens in, tokens out) if it has such."""
        try:
            content = _strings(json.loads(body.decode("utf-8")), self._clean)
            choice = content["choices"][0]
            message = choice.get("message")
            text = message.get("content") if isinstance(message, dict) else choice.get("text")
            if "message" not in choice and "text" not in choice:
                raise KeyError("message")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as e:
            what = f"{type(e).__name__} in a body of {len(body)} bytes"
            raise _Fault("malformed", f"no completion in the answer ({what})", True) from None
        reason = choice.get("finish_reason")
        reason = reason if isinstance(reason, str) else ""
        usage = _usage(content.get("usage"))
        if not isinstance(text, str):
            return Reply(None, f"no text in the reply (finish_reason {reason!r})", reason), usage
        # Half a surrogate pair has no encoding: no file could hold it.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return Reply(text, None, reason, _logprobs(choice.get("logprobs"))), usage

    def _clean(self, text: str) -> str:
        for shape in self._shapes:
            text = text.replace(shape, "[key]")
        return text


def _key_of(variable: str) -> str:
    """The key in an environment variable, without the line end that a file leaves around it."""
    key = os.environ.get(variable, "").strip()
    if not all("!" <= c <= "~" for c in key):  # the client's error would quote it
        raise UserError(f"{variable} holds what no key has: a space, a line end or other signs")
    return key


def _shapes_of(key: str) -> list[str]:
    """The key as it is and as JSON, Python and an address write it, the longest first.

    What servers of one's own take for a key ("EMPTY", "none") is no secret, but a word of texts.
    """
    if len(key) < SECRET:
        return []
    shapes = {key, json.dumps(key)[1:-1], repr(key)[1:-1], quote(key, safe="")}
    return sorted({*shapes, key.replace("/", "\\/")}, key=len, reverse=True)


def _strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_strings(v, change) for v in value]
    if isinstance(value, dict):
        return {change(k): _strings(v, change) for k, v in value.items()}
    return value


def _seconds(headers: Any) -> float:
    """Retry-After: seconds, or the date until which to wait."""
    text = str(headers.get("retry-after", ""))
    try:
        value = float(text)
    except ValueError:
        try:
            value = parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return value if 0 < value < math.inf else 0.0


def _usage(value: Any) -> tuple[int, int] | None:
    if not isinstance(value, dict):
        return None
    found = (value.get("prompt_tokens"), value.get("completion_tokens"))
    for n in found:
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**40:
            return None
    return found  # type: ignore[return-value]


def _logprobs(value: Any) -> list[dict[str, Any]] | None:
    """The tokens' log-probs if every one of them is what it should be, else None."""
    if not isinstance(value, dict):
        return None
    entries = value.get("content")
    if isinstance(value.get("token_logprobs"), list) and isinstance(value.get("tokens"), list):
        pairs = zip(value["tokens"], value["token_logprobs"], strict=False)
        entries = [{"token": token, "logprob": logprob} for token, logprob in pairs]
    if not isinstance(entries, list) or not entries:
        return None
    result = []
    for entry in entries:
        if not _is_logprob(entry):
            return None
        top = entry.get("top_logprobs")
        top = top if isinstance(top, list) else []
        if not all(_is_logprob(t) for t in top):
            return None
        kept = [{"token": _text(t["token"]), "logprob": float(t["logprob"])} for t in top]
        result.append(
            {
                "token": _text(entry["token"]),
                "logprob": float(entry["logprob"]),
                "top_logprobs": kept,
            }
        )
    return result


def _is_logprob(entry: Any) -> bool:
    """A token and the log of a probability: a number of at most 0 (rounding aside)."""
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        return False
    value = entry.get("logprob")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value <= 1e-3


def _text(token: str) -> str:
    return token.encode("utf-8", "replace").decode("utf-8")
