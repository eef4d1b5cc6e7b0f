"""Reward against KL: offline DPO beside three iterative rounds, for several betas.

    python benchmarks/frontier.py SENTENCES [--full] [--out build/frontier]

A small Llama learns the sentences (one a line of the file: JSONL with `text`, or plain text); then
it continues their first three words. The reward of a continuation is VADER's compound score, so the
ground truth is known and nobody is asked. Offline: pairs of the starting model's samples, once.
Iterative: the same number of samples and steps in three rounds, each from the current policy.
Every `POINT` steps: mean reward and exact KL to the starting model (summed over the vocabulary at
each position, nats a sequence) on fresh samples of held-out beginnings.

What is done is kept in the folder and not done again. The first pairs of a seed are the same on
each of its lines, and are made once. The design of the first part is the DPO
paper's sentiment task (arXiv 2305.18290, section 6) at the size of a laptop.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from frontier_chart import conclusions, draw
from torch import Tensor

import dpo_kernels as dk

WORDS, MOST, NEW = 3, 24, 20  # of the prompt, of a sentence in training, of a continuation
PAD, BOS, EOS, UNK = range(4)
BEGINNINGS, SAMPLES, HELD = 1500, 4, 400
STEPS, PAIRS, POINT, ROUNDS = 120, 32, 40, 3
RATE = 2e-4


@dataclass(frozen=True)
class Run:
    """One line of the front."""

    mode: str  # offline | iterative
    beta: float
    seed: int
    path: str = "fused"  # fused | plain


# --- the starting model ---


def read_sentences(file: Path) -> list[list[str]]:
    """Lower-case words of each sentence that is long enough."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        text = json.loads(line).get("text", "") if line.lstrip().startswith("{") else line
        words = text.lower().split()
        if len(words) >= WORDS + 3:
            found.append(words[:MOST])
    if len(found) < BEGINNINGS // 2:
        raise SystemExit(f"{file}: {len(found)} sentences, at least {BEGINNINGS // 2} wanted")
    return found


class Vocabulary:
    """Words that occur at least three times."""

    def __init__(self, sentences: list[list[str]]) -> None:
        counts = Counter(w for s in sentences for w in s)
        kept = sorted(w for w, n in counts.items() if n >= 3)
        self.words = ["<pad>", "<bos>", "<eos>", "<unk>", *kept]
        self.ids = {w: i for i, w in enumerate(self.words)}

    def encode(self, words: Sequence[str]) -> list[int]:
        return [self.ids.get(w, UNK) for w in words]

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids if i > UNK)


def make_model(V: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def padded(rows: Sequence[list[int]], value: int = PAD) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def pretrain(model: Any, rows: list[list[int]], seconds: float, seed: int) -> float:
    """At most one epoch, at most so long; the last losses."""
    rng, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = rng.sample(range(len(rows)), len(rows))
    began, losses = time.perf_counter(), []
    for start in range(0, len(order) - 32, 32):
        ids = padded([rows[i] for i in order[start : start + 32]])
        labels = torch.where(ids == PAD, -100, ids)
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if time.perf_counter() - began > seconds:
            break
    return sum(losses[-20:]) / len(losses[-20:])


# --- samples, rewards, pairs ---


@torch.no_grad()
def sample(model: Any, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """One continuation of each prompt, with its end."""
    torch.manual_seed(seed)
    model.eval()
    out: list[list[int]] = []
    for start in range(0, len(prompts), 500):
        ids = torch.tensor(prompts[start : start + 500])  # all of one length
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=NEW,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )[:, ids.shape[1] :].tolist()
        out += [row[: row.index(EOS) + 1] if EOS in row else row for row in new]
    return out


class Reward:
    """VADER's compound score of prompt and continuation."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.vocabulary, self.analyzer = vocabulary, SentimentIntensityAnalyzer()

    def __call__(self, ids: Sequence[int]) -> float:
        return self.analyzer.polarity_scores(self.vocabulary.text(ids))["compound"]


Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def make_pairs(model: Any, reward: Reward, prompts: list[list[int]], seed: int) -> list[Pair]:
    """Every strict pair of the samples of a prompt."""
    repeated = [p for p in prompts for _ in range(SAMPLES)]
    drawn = sample(model, repeated, seed)
    pairs = []
    for i, prompt in enumerate(prompts):
        group = drawn[i * SAMPLES : (i + 1) * SAMPLES]
        scores = [reward(prompt + c) for c in group]
        for a in range(SAMPLES):
            for b in range(SAMPLES):
                if scores[a] > scores[b]:
                    pairs.append((prompt, group[a], group[b]))
    return pairs


def batch_of(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """(ids, labels), each [2B, T]."""
    return scored([(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs])


def scored(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(ids, labels), each [rows, T], of prompts with their continuations."""
    ids = padded([p + c for p, c in rows])
    return ids, padded([[-100] * len(p) + c for p, c in rows], -100)


def pair_loss(model: Any, ids: Tensor, labels: Tensor, ref: Tensor, run: Run) -> Tensor:
    """DPO's loss by the fused head, or by plain torch."""
    if run.path == "fused":
        hidden = model.model(ids).last_hidden_state
        return dk.fused_linear_dpo_loss(
            hidden, model.lm_head.weight, labels, ref_logps=ref, beta=run.beta
        ).loss
    logps = plain_logps(model, ids, labels)
    ratio = logps - ref
    B = len(ratio) // 2
    return -torch.nn.functional.logsigmoid(run.beta * (ratio[:B] - ratio[B:])).mean()


def plain_logps(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    at = labels[:, 1:]
    return (logits.gather(-1, at.clamp(min=0)[..., None])[..., 0] * (at != -100)).sum(-1)


@torch.no_grad()
def reference_logps(model: Any, pairs: Sequence[Pair]) -> Tensor:
    """[pairs, 2]; each text is scored once, however many pairs it is in."""
    sides = [[(tuple(p), tuple(text)) for text in (c, r)] for p, c, r in pairs]
    texts = sorted({text for pair in sides for text in pair}, key=lambda t: (len(t[1]), t))
    known: dict[Any, float] = {}
    for start in range(0, len(texts), 256):
        group = texts[start : start + 256]
        logps = plain_logps(model, *scored([(list(p), list(c)) for p, c in group]))
        known.update(zip(group, logps.tolist(), strict=True))
    return torch.tensor([[known[text] for text in pair] for pair in sides])


# --- a line of the front ---


@torch.no_grad()
def measure(
    policy: Any, start: Any, reward: Reward, prompts: list[list[int]], seed: int
) -> dict[str, float]:
    drawn = sample(policy, prompts, seed)
    kl = 0.0
    for i in range(0, len(prompts), 50):
        ids, labels = scored(list(zip(prompts[i : i + 50], drawn[i : i + 50], strict=True)))
        keep = labels[:, 1:] != -100
        log_p, log_q = (m(ids).logits[:, :-1][keep].log_softmax(-1) for m in (policy, start))
        kl += float((log_p.exp() * (log_p - log_q)).sum())
    rewards = [reward(p + c) for p, c in zip(prompts, drawn, strict=True)]
    return {"reward": sum(rewards) / len(rewards), "kl": kl / len(prompts)}


def train(run: Run, work: Work) -> list[dict[str, Any]]:
    """The points of a line: a list of {step, reward, kl}."""
    policy = work.fresh_model()
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=RATE)
    points: list[dict[str, Any]] = []
    rounds = ROUNDS if run.mode == "iterative" else 1
    share = len(work.prompts) // rounds
    step = 0
    for r in range(rounds):
        prompts = work.prompts[r * share : (r + 1) * share]
        if r == 0:
            pairs, ref = work.first_pairs(prompts, run.seed * 1000)
        else:
            pairs = make_pairs(policy, work.reward, prompts, run.seed * 1000 + r)
            ref = reference_logps(work.start, pairs)
        order = random.Random(run.seed * 77 + r).sample(range(len(pairs)), len(pairs))
        policy.train()
        for i in range(STEPS // rounds):
            step += 1
            at = [order[(i * PAIRS + k) % len(order)] for k in range(PAIRS)]
            ids, labels = batch_of([pairs[k] for k in at])
            loss = pair_loss(policy, ids, labels, ref[at].T.reshape(-1), run)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, step / 10)
            optimizer.step()
            optimizer.zero_grad()
            if step % POINT == 0:
                found = measure(policy, work.start, work.reward, work.held, run.seed)
                points.append({"step": step, "pairs": len(pairs), **found})
                policy.train()
    return points


class Work:
    """The folder: the starting model, and the lines that are done."""

    def __init__(self, folder: Path, sentences: Path, seconds: float) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        texts = read_sentences(sentences)
        random.Random(0).shuffle(texts)
        self.vocabulary = Vocabulary(texts)
        self.reward = Reward(self.vocabulary)
        rows = [[BOS, *self.vocabulary.encode(t), EOS] for t in texts]
        self.start = self.fresh_model(saved=False)
        file = folder / "start.pt"
        if not file.exists():
            torch.manual_seed(0)
            self.start = make_model(len(self.vocabulary.words))
            loss = pretrain(self.start, rows, seconds, 0)
            print(f"starting model: loss {loss:.3f} a word", flush=True)
            part = file.with_suffix(".writing")
            torch.save(self.start.state_dict(), part)
            part.replace(file)
        self.start.load_state_dict(torch.load(file, weights_only=True))
        self.start.eval()
        beginnings = list(dict.fromkeys(tuple(r[: WORDS + 1]) for r in rows))
        self.held = [list(b) for b in beginnings[:HELD]]
        self.prompts = [list(b) for b in beginnings[HELD : HELD + BEGINNINGS]]
        self.results = folder / "frontier.jsonl"
        self._first: dict[tuple[int, int], tuple[list[Pair], Tensor]] = {}

    def first_pairs(self, prompts: list[list[int]], seed: int) -> tuple[list[Pair], Tensor]:
        """The pairs of the starting model's samples, and their log-probs under it."""
        key = (len(prompts), seed)
        if key not in self._first:
            pairs = make_pairs(self.start, self.reward, prompts, seed)
            self._first[key] = pairs, reference_logps(self.start, pairs)
        return self._first[key]

    def fresh_model(self, saved: bool = True) -> Any:
        model = make_model(len(self.vocabulary.words))
        if saved:
            model.load_state_dict(self.start.state_dict())
        return model

    def done(self) -> list[dict[str, Any]]:
        if not self.results.exists():
            return []
        text = self.results.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # killed while it wrote the last line
            self.results.write_text(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def run(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Every line that is not there yet; all lines."""
        rows = self.done()
        if not any(row["mode"] == "start" for row in rows):
            found = measure(self.start, self.start, self.reward, self.held, 0)
            rows.append({"mode": "start", "points": [{"step": 0, **found}]})
            self._add(rows[-1])
        known = {tuple(row.get(k) for k in ("mode", "beta", "seed", "path")) for row in rows}
        for run in runs:
            if (run.mode, run.beta, run.seed, run.path) in known:
                continue
            began, used = time.perf_counter(), time.process_time()
            points = train(run, self)
            took = {"seconds": time.perf_counter() - began}
            took["cpu_seconds"] = time.process_time() - used  # on a machine that is shared
            row = {**asdict(run), "points": points, **took}
            self._add(row)
            rows.append(row)
            last = points[-1]
            print(
                f"{run.mode:<10}beta {run.beta:<5g} seed {run.seed} {run.path}: reward "
                f"{last['reward']:.3f}, KL {last['kl']:.2f} ({row['seconds']:.0f} s)",
                flush=True,
            )
        return rows

    def _add(self, row: dict[str, Any]) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentences", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/frontier"))
    parser.add_argument("--full", action="store_true", help="5 betas, 3 seeds, fused and plain")
    parser.add_argument("--pretrain_seconds", type=float, default=150.0)
    args = parser.parse_args()
    if not args.sentences.is_file():
        parser.error(f"{args.sentences} does not exist")
    betas, seeds, paths = [0.05, 0.1, 0.5], [0], ["fused"]
    if args.full:
        betas, seeds, paths = [0.05, 0.1, 0.2, 0.5, 1.0], [0, 1, 2], ["fused", "plain"]
    runs = [
        Run(mode, beta, seed, path)
        for path in paths
        for seed in seeds
        for beta in betas
        for mode in ("offline", "iterative")
    ]
    began = time.perf_counter()
    work = Work(args.out, args.sentences, args.pretrain_seconds)
    rows = work.run(runs)
    draw(rows, args.out / "frontier.png")
    text = "\n".join(conclusions(rows))
    (args.out / "frontier.txt").write_text(text + "\n")
    print(text)
    print(f"{time.perf_counter() - began:.0f} s; {args.out}/frontier.jsonl, frontier.png")


if __name__ == "__main__":
    main()
