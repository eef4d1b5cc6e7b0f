"""Make the data set, the tokenizer and the model configuration that `dpo-kernels train` uses.

    python tools/make_default_data.py [--out dpo_kernels/data/default]

Every prompt asks for two sentences about a place (harbor, library, ...) in one of six tones
(cheerful, gloomy, spooky, calm, grumpy, formal). The answers come from a small grammar.

Pairs are made in *mirrored couples*: two answers A and B and two prompts p and q, giving the rows
(p: A over B) and (q: B over A). A and B differ in tone (same place) or in place (same tone). Hence
every answer is chosen once and rejected once, and whatever scores answers without reading the
prompt (length, a marker word, fluency) is right on exactly half of the rows, in training and in
evaluation. Answers never contain the words with which a tone is asked for, so the tone cannot be
had by copying either.

What evaluation holds out: two of the six tones of every training place (no training prompt asks
for them together), six whole places, and three wordings of the request. No answer is shared by two
files.

SFT rows come in two kinds. Requests in plain words are answered in a tone that mostly is not the
one asked for; requests in the terse style of a form ("Tone: gloomy. Place: harbor.") in the tone
they name. So after SFT the model knows what the words for the tones mean, yet with plain requests
it is close to indifferent to the tone, and DPO has something to elicit that carries over to
combinations never trained on. (Without the forms the same pairs are memorised and do not
generalise at this size.) The six places held out do occur in SFT rows, so their words are known.

The files depend on nothing but this file and default_phrases.py: the generator draws from
`random.Random(SEED).random()`,
which Python keeps stable across versions.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from default_phrases import (
    FORM_PLACE,
    FORM_TONE,
    FRAMES,
    HELD_FRAMES,
    HELD_PLACES,
    MOVES,
    PLACES,
    REVISIONS,
    TIMES,
    TONES,
    Place,
    Tone,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20
SFT_ROWS, SFT_FORMS, VOCABULARY = 1500, 750, 1536
TRAIN_TONE_COUPLES, TRAIN_PLACE_COUPLES = 756, 44  # 1600 rows
EVAL_COUPLES_PER_PLACE, EVAL_COUPLES_PER_HELD_PLACE, EVAL_PLACE_COUPLES = 2, 5, 6  # 240 rows
INDIRECT = 0.1  # the share of requests that do not name the tone
MULTI_TURN = 0.15  # the share of conversations with an earlier exchange

Message = dict[str, str]
Row = dict[str, list[Message]]


SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_article(word: str) -> dict[str, str]:
    """The fields `m` and `a` of a request: the word and its indefinite article."""
    return {"m": word, "a": "an" if word[0] in "aeiou" else "a"}


class Writer:
    """Draws requests and answers; never the same answer twice."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.written: set[str] = set()

    def pick(self, items: Sequence[Any], n: int = 1) -> list[Any]:
        """`n` distinct items in random order."""
        pool = list(items)
        return [pool.pop(int(self.rng.random() * len(pool))) for _ in range(n)]

    def shuffle(self, items: Sequence[Any]) -> list[Any]:
        """All items in random order."""
        return self.pick(items, len(items))

    def chance(self, share: float) -> bool:
        """True with probability `share`."""
        return self.rng.random() < share

    def answer(self, place: Place, tone: Tone) -> str:
        """Two sentences about `place` in `tone`, not written before."""
        while True:
            d, e = self.pick(place.things, 2)
            fields = {"s": place.name, "at": place.at, "d": d, "e": e, "p": place.people}
            sentences = []
            for templates in (tone.first, tone.second):
                a, b = self.pick(tone.adjectives, 2)
                (template,), (t,) = self.pick(templates), self.pick(TIMES)
                sentences.append(template.format(a=a, b=b, t=t, **fields))
            text = " ".join(sentences)
            if text not in self.written:
                self.written.add(text)
                return text

    def request(self, place: Place, tone: Tone, held: bool = False) -> str:
        """A request for `tone` and `place`; evaluation (`held`) often uses the held-out frames."""
        if self.chance(INDIRECT):
            return self.pick(tone.indirect)[0].format(s=place.name)
        unseen = held and self.chance(0.5)
        (frame,) = self.pick(FRAMES[-HELD_FRAMES:] if unseen else FRAMES[:-HELD_FRAMES])
        (word,) = self.pick(tone.asked_as)
        return frame.format(s=place.name, **with_article(word))

    def form(self, place: Place | None, tone: Tone) -> str:
        """A request in the style of a form; without a place, a change of the tone alone."""
        (word,) = self.pick(tone.asked_as)
        if place is None:
            return FORM_TONE.format(m=word)
        lines = self.shuffle((FORM_PLACE.format(s=place.name), FORM_TONE.format(m=word)))
        return " ".join(lines)

    def revision(self, tone: Tone) -> str:
        """A second turn that asks for another tone."""
        (template,), (word,) = self.pick(REVISIONS), self.pick(tone.asked_as)
        return template.format(**with_article(word))

    def move(self, place: Place) -> str:
        """A second turn that asks for another place."""
        return self.pick(MOVES)[0].format(s=place.name)


def user(text: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """A message of the assistant."""
    return {"role": "assistant", "content": text}


def is_held(place: Place, tone: Tone) -> bool:
    """Whether no training pair may ask for this place in this tone."""
    i = PLACES.index(place)
    pairs = list(itertools.combinations(TONES, 2))
    return i >= len(PLACES) - HELD_PLACES or tone in pairs[i % len(pairs)]


def tone_couple(w: Writer, place: Place, tones: Sequence[Tone], held: bool) -> list[Row]:
    """Two rows about one place: each tone wins where it is asked for."""
    answers = [w.answer(place, tone) for tone in tones]
    rows = []
    for i in (0, 1):
        asked, other = tones[i], tones[1 - i]
        if not w.chance(MULTI_TURN):
            prompt = [user(w.request(place, asked, held))]
        elif w.chance(0.5):  # first the other tone, then a change of mind
            earlier = [user(w.request(place, other, held)), assistant(w.answer(place, other))]
            prompt = [*earlier, user(w.revision(asked))]
        else:  # the tone is named for another place, which a training pair may have it with
            (there,) = w.pick([p for p in PLACES if p != place and not is_held(p, asked)])
            earlier = [user(w.request(there, asked, held)), assistant(w.answer(there, asked))]
            prompt = [*earlier, user(w.move(place))]
        rows.append(pair(prompt, answers[i], answers[1 - i]))
    return rows


def place_couple(w: Writer, places: Sequence[Place], tone: Tone, held: bool) -> list[Row]:
    """Two rows in one tone: each place wins where it is asked for."""
    answers = [w.answer(place, tone) for place in places]
    rows = []
    for i in (0, 1):
        asked, other = places[i], places[1 - i]
        if w.chance(MULTI_TURN):
            earlier = [user(w.request(other, tone, held)), assistant(w.answer(other, tone))]
            prompt = [*earlier, user(w.move(asked))]
        else:
            prompt = [user(w.request(asked, tone, held))]
        rows.append(pair(prompt, answers[i], answers[1 - i]))
    return rows


def pair(prompt: list[Message], chosen: str, rejected: str) -> Row:
    """A preference row in the conversational format."""
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def train_rows(w: Writer) -> list[Row]:
    """Preference rows for training; no request asks for a held-out combination."""
    rows: list[Row] = []
    seen = PLACES[:-HELD_PLACES]
    for i in range(TRAIN_TONE_COUPLES):
        place = seen[i % len(seen)]
        free = [tone for tone in TONES if not is_held(place, tone)]
        rows += tone_couple(w, place, w.pick(free, 2), held=False)
    for i in range(TRAIN_PLACE_COUPLES):
        tone = TONES[i % len(TONES)]
        places = w.pick([p for p in seen if not is_held(p, tone)], 2)
        rows += place_couple(w, places, tone, held=False)
    return w.shuffle(rows)


def eval_rows(w: Writer) -> list[Row]:
    """Preference rows for evaluation; every last request asks for a held-out combination."""
    rows: list[Row] = []
    for place in PLACES:
        tones = [tone for tone in TONES if is_held(place, tone)]
        whole = len(tones) == len(TONES)
        for _ in range(EVAL_COUPLES_PER_HELD_PLACE if whole else EVAL_COUPLES_PER_PLACE):
            rows += tone_couple(w, place, w.pick(tones, 2), held=True)
    for i in range(EVAL_PLACE_COUPLES):
        tone = TONES[i % len(TONES)]
        rows += place_couple(w, w.pick([p for p in PLACES if is_held(p, tone)], 2), tone, held=True)
    return w.shuffle(rows)


def sft_rows(w: Writer) -> list[Row]:
    """Conversations of two kinds, always about the place asked for.

    Requests in plain words get a tone that runs through all six, the one they ask for half as often
    as each other (one row in eleven): without that discount the forms would leak into plain
    requests. Requests in the terse style of a form get the tone they name. Like the training
    pairs, no request asks for a held-out combination of a training place.
    """
    rows: list[Row] = []
    off_diagonal = list(itertools.permutations(TONES, 2))
    cells = [*itertools.product(TONES, TONES), *off_diagonal]
    for i in range(SFT_ROWS):
        as_form = i < SFT_FORMS
        asked, given = cells[i % len(cells)]
        places = [p for p in PLACES if p in PLACES[-HELD_PLACES:] or not is_held(p, asked)]
        place, there = w.pick(places, 2)
        (random_tone,) = w.pick(TONES)
        prompt: list[Message] = []
        if not w.chance(MULTI_TURN):
            prompt = [user(w.form(place, asked) if as_form else w.request(place, asked))]
        elif is_held(place, random_tone) or w.chance(0.5):  # the second turn moves
            first = w.form(there, asked) if as_form else w.request(there, asked)
            shown = asked if as_form else random_tone
            second = FORM_PLACE.format(s=place.name) if as_form else w.move(place)
            prompt = [user(first), assistant(w.answer(there, shown)), user(second)]
        else:  # the second turn revises
            first = w.form(place, random_tone) if as_form else w.request(place, random_tone)
            shown = random_tone if as_form else w.pick(TONES)[0]
            second = w.form(None, asked) if as_form else w.revision(asked)
            prompt = [user(first), assistant(w.answer(place, shown)), user(second)]
        answer = w.answer(place, asked if as_form else given)
        rows.append({"messages": [*prompt, assistant(answer)]})
    return w.shuffle(rows)


def make_tokenizer(texts: Iterable[str]) -> dict[str, Any]:
    """A byte-level BPE tokenizer (no text is unknown to it) learnt from `texts`, as its JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def tokenizer_config() -> dict[str, Any]:
    """What `AutoTokenizer` reads beside the tokenizer itself."""
    pad, bos, _, end = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": end,
        "padding_side": "right",
        "model_max_length": MODEL["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


MODEL: dict[str, Any] = {  # 1.05 M parameters
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": SPECIAL_TOKENS.index("<|pad|>"),
    "bos_token_id": SPECIAL_TOKENS.index("<|bos|>"),
    "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
}


def messages_of(row: Row) -> list[Message]:
    """All messages of a row, whatever its columns."""
    return [message for column in row.values() for message in column]


def make_files() -> dict[str, str]:
    """File name -> content, of every file that this script makes."""
    w = Writer(SEED)
    rows = {"train.jsonl": train_rows(w), "eval.jsonl": eval_rows(w), "sft.jsonl": sft_rows(w)}
    files = {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        for name, table in rows.items()
    }
    texts = [
        f"{message['role']}\n{message['content']}"
        for name in ("train.jsonl", "sft.jsonl")
        for row in rows[name]
        for message in messages_of(row)
    ]
    documents = {
        "tokenizer.json": make_tokenizer(texts),
        "tokenizer_config.json": tokenizer_config(),
        "config.json": MODEL,
    }
    for name, document in documents.items():
        indent = None if name == "tokenizer.json" else 2
        files[name] = json.dumps(document, indent=indent, ensure_ascii=False) + "\n"
    return files


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description="Make the default data set and tokenizer.")
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--out", type=Path, default=here / "dpo_kernels" / "data" / "default")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, content in make_files().items():
        (out / name).write_text(content, encoding="utf-8", newline="\n")
        print(f"{out / name}: {len(content.encode()):,} bytes")


if __name__ == "__main__":
    main()
