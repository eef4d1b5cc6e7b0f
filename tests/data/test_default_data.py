"""The default data set: reproducible, fair between chosen and rejected, and learnable."""

import importlib.util
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "dpo_kernels" / "data" / "default"
Row = dict[str, list[dict[str, str]]]


def load(name: str) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


def words(text: str) -> list[str]:
    """Lower-case words."""
    return re.findall(r"[a-z]+", text.lower())


def answers(rows: list[Row], column: str) -> list[str]:
    """The text of one column's answer in each row."""
    return [row[column][0]["content"] for row in rows]


def asked(row: Row) -> str:
    """What the user said, all turns."""
    return " ".join(m["content"] for m in row["prompt"] if m["role"] == "user")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """tools/make_default_data.py as a module."""
    path = ROOT / "tools" / "make_default_data.py"
    if not path.exists():
        pytest.skip("the data generator is not part of an installed package")
    spec = importlib.util.spec_from_file_location("make_default_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # for default_phrases beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@pytest.fixture(scope="module")
def train() -> list[Row]:
    """The training pairs."""
    return load("train.jsonl")


@pytest.fixture(scope="module")
def evaluation() -> list[Row]:
    """The evaluation pairs."""
    return load("eval.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The shipped tokenizer."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER)


def test_regenerating_gives_the_same_files(maker: ModuleType) -> None:
    for name, content in maker.make_files().items():
        assert (FOLDER / name).read_bytes() == content.encode(), name


def test_shape_and_size(train: list[Row], evaluation: list[Row]) -> None:
    assert (len(train), len(evaluation), len(load("sft.jsonl"))) == (1600, 240, 1500)
    for row in train + evaluation:
        assert set(row) == {"prompt", "chosen", "rejected"}
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert [m["role"] for m in row["chosen"] + row["rejected"]] == ["assistant"] * 2
        assert row["chosen"] != row["rejected"]
    assert 0.1 < sum(len(row["prompt"]) > 1 for row in train) / len(train) < 0.3
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_every_answer_is_chosen_once_and_rejected_once(name: str) -> None:
    """So a scorer blind to the prompt, whatever it measures, is right on half of the rows."""
    rows = load(name)
    chosen, rejected = Counter(answers(rows, "chosen")), Counter(answers(rows, "rejected"))
    assert chosen == rejected and set(chosen.values()) == {1}
    couples = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows}
    assert couples == {(b, a) for a, b in couples}


def test_evaluation_is_held_out(maker: ModuleType, train: list[Row], evaluation: list[Row]) -> None:
    trained = set(answers(train, "chosen")) | {
        message["content"] for row in load("sft.jsonl") for message in row["messages"]
    }
    assert not trained & set(answers(evaluation, "chosen"))
    prompts = {json.dumps(row["prompt"]) for row in train}
    assert not any(json.dumps(row["prompt"]) in prompts for row in evaluation)

    seen = {word for row in train for word in words(json.dumps(row))}
    held = {place.name for place in maker.PLACES[-maker.HELD_PLACES :]}
    assert not held & seen
    assert any(held & set(words(asked(row))) for row in evaluation)

    requests = " ".join(asked(row) for row in train)
    for frame in maker.FRAMES[-maker.HELD_FRAMES :]:
        pattern = re.escape(frame).replace(r"\{s\}", r"\w+").replace(r"\{m\}", r"\w+")
        pattern = r"(^|[.?!] )" + pattern.replace(r"\{a\}", r"an?")
        assert not re.search(pattern, requests), frame
        assert any(re.search(pattern, asked(row)) for row in evaluation), frame


def test_answers_do_not_contain_the_words_that_ask(maker: ModuleType, train: list[Row]) -> None:
    asking = {word for tone in maker.TONES for word in (*tone.asked_as, tone.name)}
    assert not asking & {word for text in answers(train, "chosen") for word in words(text)}


def linear_accuracy(train: list[Row], evaluation: list[Row], use_prompt: bool) -> float:
    """Held-out accuracy of naive Bayes on answer words, each joined to each word that asks."""

    def features(row: Row, column: str) -> set[tuple[str, str]]:
        asks = set(words(row["prompt"][-1]["content"])) if use_prompt else {""}
        return {(a, w) for a in asks for w in set(words(row[column][0]["content"]))}

    chosen, rejected = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in train:
        chosen.update(features(row, "chosen"))
        rejected.update(features(row, "rejected"))

    def score(row: Row, column: str) -> float:
        return sum(math.log((chosen[f] + 0.5) / (rejected[f] + 0.5)) for f in features(row, column))

    right = [score(row, "chosen") > score(row, "rejected") for row in evaluation]
    return sum(right) / len(right)


def test_only_the_prompt_tells_which_answer_is_better(
    train: list[Row], evaluation: list[Row]
) -> None:
    assert linear_accuracy(train, evaluation, use_prompt=False) <= 0.5  # ties count as wrong
    assert linear_accuracy(train, evaluation, use_prompt=True) > 0.8


def test_sft_answers_follow_forms_but_seldom_plain_requests(maker: ModuleType) -> None:
    word_tone = {word: tone.name for tone in maker.TONES for word in tone.asked_as}
    adjective_tone = {word: tone.name for tone in maker.TONES for word in tone.adjectives}
    agree: dict[bool, list[bool]] = {True: [], False: []}  # request in the style of a form?
    for row in load("sft.jsonl"):
        *prompt, answer = row["messages"]
        requested = [word_tone[w] for w in words(prompt[-1]["content"]) if w in word_tone]
        given = {adjective_tone[w] for w in words(answer["content"]) if w in adjective_tone}
        if requested and given:
            agree["Tone: " in prompt[-1]["content"]].append(given == {requested[-1]})
    assert all(agree[True]) and len(agree[True]) > 400
    assert len(agree[False]) > 400
    assert sum(agree[False]) / len(agree[False]) == pytest.approx(1 / 11, abs=0.03)


def test_tokenizer(tokenizer: Any, train: list[Row]) -> None:
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|pad|>", "<|bos|>", "<|im_end|>")]
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == ids
    for text in (
        "na\u00efve \u6f22\u5b57, 42 \U0001f937\n  end ",
        train[0]["chosen"][0]["content"],
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for row in train[:50]:
        head = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        full = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=True)
        assert full["input_ids"][: len(head)] == head
        assert full["input_ids"][-1] == tokenizer.eos_token_id
        assert full["input_ids"].count(tokenizer.bos_token_id) == 1


def test_model_config(tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.AutoConfig.from_pretrained(FOLDER)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 2.5e6
    assert config.vocab_size == len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name)


def test_recipe_fits_the_data(tokenizer: Any, train: list[Row], evaluation: list[Row]) -> None:
    recipe = json.loads((FOLDER / "recipe.json").read_text("utf-8"))
    assert set(recipe) == {"sft", "dpo", "sample", "seed"}
    assert recipe["sample"]["prompt"] in [asked(row) for row in evaluation]
    for row in train + evaluation:
        for column in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(row["prompt"] + row[column], tokenize=False)
            assert len(tokenizer(text)["input_ids"]) <= recipe["dpo"]["max_length"]
