"""`generate`: k samples a prompt, from a model of this process or from a server.

The seed of a sample depends on the run's seed and on its prompt and number alone (in process: on
its batch, which depends on the list of prompts), so a run that goes on draws what it would have
drawn. Samples appear in a journal as they come; the file is written when all are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..train.config_files import UserError
from ..train.console import Console
from ..train.ranks import ALONE, Ranks
from .endpoint import Endpoint
from .local_models import LocalModel, prompt_ids
from .records import Journal, Prompt, of_rank, write_table
from .reply_cache import Reply, Request
from .settings import SamplingOptions


@dataclass(frozen=True)
class SampleCounts:
    prompts: int
    samples: int
    errors: int  # of the server: samples that are missing
    first_error: str | None


def seed_of(*parts: object) -> int:
    """A seed below 2**31 from anything that has a text."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def generate(
    prompts: Sequence[Prompt],
    source: LocalModel | Endpoint,
    options: SamplingOptions,
    output: str | Path,
    console: Console | None = None,
    ranks: Ranks = ALONE,
) -> SampleCounts:
    """Write `num_samples` samples of each prompt; what an earlier call had drawn is kept.

    Of many `ranks` each draws a part, the same samples as one process would; the first one writes.
    """
    output, console = Path(output), console or Console(quiet=True)
    if isinstance(source, LocalModel):
        who: Any = source.identity
    else:
        who = [source.options.base_url, source.options.model, source.options.extra_body]
    drawn_how = {f.name: getattr(options, f.name) for f in fields(SamplingOptions)}
    with ranks.together():
        asked = [[p.id, p.prompt] for p in prompts]
        journal = Journal.of(output, [who, asked, drawn_how], ranks)
    done = {(row["id"], row["sample"]) for row in journal.rows}
    errors: list[str] = []
    try:
        with ranks.together():
            if isinstance(source, Endpoint):
                mine = of_rank(ranks, [p.id for p in prompts])
                own = [p for p in prompts if p.id in mine]
                _from_server(own, source, options, journal, done, errors)
            else:
                _in_process(prompts, source, options, journal, done, console, ranks)
            journal.close()
    finally:
        journal.close()
    missing = [error for found in ranks.objects(errors) for error in found]

    def finish() -> int:
        place = {p.id: i for i, p in enumerate(prompts)}
        rows = sorted(journal.every_row(), key=lambda r: (place[r["id"]], r["sample"]))
        if not rows:
            first = f": {missing[0]}" if missing else ""
            journal.drop()
            raise UserError(f"no sample was drawn{first}")
        write_table(output, rows)
        if not missing:  # else a later call asks for what is missing alone
            journal.drop()
        return len(rows)

    drawn = ranks.first_does(finish)
    return SampleCounts(len(prompts), drawn, len(missing), missing[0] if missing else None)


def _row(prompt: Prompt, number: int, text: str, reason: str, seed: int, options: Any) -> dict:
    return {
        "prompt": prompt.prompt,
        "completion": text,
        "sample": number,
        "seed": seed,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "finish_reason": reason,
        "id": prompt.id,
    }


def _in_process(
    prompts: Sequence[Prompt],
    model: LocalModel,
    options: SamplingOptions,
    journal: Journal,
    done: set[tuple[str, int]],
    console: Console,
    ranks: Ranks,
) -> None:
    k = options.num_samples
    ids = {p.id: prompt_ids(model.tokenizer, p.prompt) for p in prompts}
    # Prompts of like length together: little padding. The order is a function of the prompts.
    order = sorted(prompts, key=lambda p: len(ids[p.id]))
    each = max(1, options.sample_batch_size // k)
    starts = range(0, len(order), each)
    rows = [min(each, len(order) - start) for start in starts]
    # Whole batches are divided: which one a prompt is in does not depend on how many ranks sample.
    mine = [starts[at] for at in ranks.share(rows)]
    for start in console.progress(mine, "sampling", len(mine), "batches"):
        ranks.at("sampling")
        group = [(p, n) for p in order[start : start + each] for n in range(k)]
        if all((p.id, n) in done for p, n in group):
            continue
        seed = seed_of(options.seed, start, *(p.id for p, _ in group))
        torch.manual_seed(seed)
        drawn = model.sample([ids[p.id] for p, _ in group], options)
        found = []
        for (prompt, number), one in zip(group, drawn, strict=True):
            row = _row(prompt, number, one.text, one.finish_reason, seed, options)
            if options.logps:
                row |= {"logps": [round(x, 6) for x in one.logps], "token_ids": one.ids}
            if (prompt.id, number) not in done:  # kill -9 cuts a write too: half a batch is there
                found.append(row)
        journal.add(found)


def _from_server(
    prompts: Sequence[Prompt],
    endpoint: Endpoint,
    options: SamplingOptions,
    journal: Journal,
    done: set[tuple[str, int]],
    errors: list[str],
) -> None:
    todo = [(p, n) for p in prompts for n in range(options.num_samples) if (p.id, n) not in done]
    requests, seeds = [], []
    for prompt, number in todo:
        seed = seed_of(options.seed, prompt.id, number)
        fields: dict[str, Any] = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": seed,
        }
        if options.stop:
            fields["stop"] = options.stop
        if options.logps:
            fields["logprobs"] = 0 if isinstance(prompt.prompt, str) else True
        requests.append(Request(prompt.prompt, fields, options.max_new_tokens))
        seeds.append(seed)

    def keep(i: int, reply: Reply) -> None:
        prompt, number = todo[i]
        if reply.text is None:
            errors.append(reply.error or "no reply")
            return
        row = _row(prompt, number, reply.text, reply.finish_reason, seeds[i], options)
        if options.logps and reply.logprobs:
            row["logps"] = [entry["logprob"] for entry in reply.logprobs]
        journal.add([row])

    endpoint.ask(requests, keep)
