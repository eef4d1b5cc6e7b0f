"""The training loop: layouts, reference, steps, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import byte_tokenizer, random_pairs

import dpo_kernels as dk
from dpo_kernels.data import (
    LeftOut,
    PreferencePair,
    Sharing,
    TokenSequence,
    make_batch,
    tokenize_pairs,
)
from dpo_kernels.models.attached import HeadOutput
from dpo_kernels.models.loading import without_quantization
from dpo_kernels.models.versions import dtype_option, transformers_before
from dpo_kernels.train.compare import plain_logps, step_times
from dpo_kernels.train.config import DPOTrainConfig, UserError, load_config
from dpo_kernels.train.console import Console
from dpo_kernels.train.evaluation import check_step0, evaluate
from dpo_kernels.train.loop import train
from dpo_kernels.train.metrics import MetricsFile, PairMeter
from dpo_kernels.train.model import (
    Policy,
    complete,
    prepare_policy,
)
from dpo_kernels.train.optim import Stepper, TrainingError, make_optimizer
from dpo_kernels.train.order import step_indices
from dpo_kernels.train.plots import plot_run
from dpo_kernels.train.reference import PairData, Referee
from dpo_kernels.train.sft import train_sft
from dpo_kernels.train.step_loss import PairLoss

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")

VOCAB = 260
QUIET = Console(quiet=True)
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(name: str = "Llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    return transformers.AutoModelForCausalLM.from_config(config, **dtype_option(dtype))


def config_of(**options: Any) -> DPOTrainConfig:
    small = {
        "device": "cpu",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "seed": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
    }
    return load_config(small, options)


def tiny_policy(model: Any = None, say: Any = print, **options: Any) -> Policy:
    return prepare_policy(model or tiny_model(), byte_tokenizer(), config_of(**options), say)


# --- layouts ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["packed", "prefix", "auto", "padded"])
def test_layouts_agree_with_the_models_own_logits(mode: str, attention: str) -> None:
    """Log-probs and every gradient, in float64, against padded logits + log_softmax + gather."""
    model = tiny_model(dtype=torch.float64, attn_implementation=attention)
    policy = tiny_policy(model, dtype="float64")
    pairs = random_pairs(6)
    policy.sharing = Sharing(mode, 1e-3, call_tokens=6)
    ours = policy.logps(policy.batch(pairs))
    weights = torch.linspace(-1, 2, len(ours), dtype=torch.float64)
    grads = torch.autograd.grad(ours @ weights, list(model.parameters()))
    truth = plain_logps(model, pairs, policy.pad_id)
    expected = torch.autograd.grad(truth @ weights, list(model.parameters()))
    # transformers computes norms and softmax in float32 whatever the dtype: hence not 1e-12
    torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-6)
    for grad, other in zip(grads, expected, strict=True):
        assert (grad - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    ("name", "options", "shared"),
    [
        ("Qwen3", {"head_dim": 8}, True),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, True),
        ("GPTNeoX", {}, True),
        # logits with extras: soft-capping, divided, multiplied
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 4}, True),
        ("Granite", {"logits_scaling": 4.0}, True),
        ("Cohere", {"logit_scale": 0.25}, True),
        ("Mistral", {"sliding_window": 4}, True),
        # a recurrent state
        ("Mamba", {"state_size": 4}, False),
    ],
)
def test_architectures(name: str, options: dict[str, Any], shared: bool) -> None:
    """The head check passes, and prompts are shared exactly where that changes nothing."""
    said: list[str] = []
    try:
        model = tiny_model(name, dtype=torch.float64, **options)
    except (TypeError, ValueError, AttributeError) as error:
        pytest.skip(f"{name} is not in this transformers: {error}")
    shared &= not transformers_before(4, 55)
    policy = tiny_policy(model, said.append, dtype="float64")
    assert (policy.sharing.mode == "auto") == shared == (not said), said
    if not shared:
        with pytest.raises(UserError, match="batch_layout=prefix"):
            tiny_policy(model, batch_layout="prefix")
    pairs = random_pairs(3)
    got = []
    for layout in ("padded", policy.sharing.mode):
        policy.sharing = replace(policy.sharing, mode="prefix" if layout == "auto" else layout)
        got.append(policy.logps(policy.batch(pairs)).detach())
    # one sequence at a time: some eager attention gives NaN where padding sees nothing
    alone = [s for p in pairs for s in p.sequences]
    truth = torch.stack([_logp_of(model, s) for s in (*alone[::2], *alone[1::2])])
    for logps in got:
        torch.testing.assert_close(logps.double(), truth.double(), rtol=1e-6, atol=1e-5)


def _logp_of(model: Any, sequence: TokenSequence) -> torch.Tensor:
    ids = torch.tensor([sequence.ids])
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[sequence.first_scored - 1 :].sum().detach()


def test_unknown_head_extra_is_an_error() -> None:
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(UserError, match=r"differ by .* nats"):
        tiny_policy(model)


def test_absent_backend_is_an_error() -> None:
    with pytest.raises(UserError, match="cuda"):
        tiny_policy(backend="cuda")


def test_dropout_is_off() -> None:
    model = tiny_model(attention_dropout=0.5)
    gpt = tiny_model("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5)
    for policy in (tiny_policy(model), tiny_policy(gpt)):
        assert policy.model.training
        batch = policy.batch(random_pairs(2))
        assert torch.equal(policy.logps(batch), policy.logps(batch))


def test_gradient_checkpointing_changes_nothing() -> None:
    pairs = random_pairs(3)
    grads = []
    for on in (False, True):
        policy = tiny_policy(gradient_checkpointing=on)
        policy.logps(policy.batch(pairs)).sum().backward()
        grads.append([p.grad for p in policy.model.parameters()])
    torch.testing.assert_close(*grads)


def test_without_quantization(tmp_path: Path) -> None:
    """A model marked as read from GGUF keeps its function and can be saved and loaded."""
    model = tiny_model(tie_word_embeddings=True)
    ids = torch.arange(9)[None]
    expected = model(ids).logits
    model.config.quantization_config = {"quant_method": "gguf"}
    fresh = without_quantization(model)
    torch.testing.assert_close(fresh(ids).logits, expected)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    fresh.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, expected)


# --- training ---


def data_of(policy: Policy, n: int = 8, **options: Any) -> PairData:
    pairs = random_pairs(n)
    if options.get("loss_type") == "odpo":
        pairs = [replace(p, offset=0.1 * i) for i, p in enumerate(pairs)]
    return Referee(policy, config_of(**options), QUIET, own=False).data(pairs, "")


def run_train(tmp_path: Path, n: int = 8, **options: Any) -> tuple[Policy, list[dict[str, Any]]]:
    options = {"max_steps": 3, **options}
    policy = tiny_policy(**options)
    data = data_of(policy, n, **options)
    metrics = MetricsFile(tmp_path / "m.jsonl")
    train(policy, data, None, config_of(**options), metrics, QUIET)
    return policy, metrics.rows


def test_training_is_what_plain_torch_would_do(tmp_path: Path) -> None:
    """Three steps of AdamW with decay, clipping and warm-up, against a loop written out."""
    options = {
        "max_steps": 3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "beta": 0.3,
    }
    policy, rows = run_train(tmp_path, **options)
    config = config_of(**options)
    model = tiny_model()
    pairs = random_pairs(8)
    reference = plain_logps(model, pairs, 0).detach()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8)
    rates = [0.0, 0.5e-3, 1e-3]
    plan = step_indices(8, config, 3)
    for row, rate, (indices, _) in zip(rows, rates, plan, strict=True):
        logps = plain_logps(model, [pairs[i] for i in indices], 0)
        ref = reference[[*indices, *(8 + i for i in indices)]]
        ratio = logps - ref
        loss = -torch.nn.functional.logsigmoid(0.3 * (ratio[:4] - ratio[4:])).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["learning_rate"] == pytest.approx(rate)
        assert row["logps/chosen"] == pytest.approx(logps[:4].mean().item(), rel=1e-5)
        rewards = 0.3 * ratio
        assert row["rewards/margins"] == pytest.approx(
            (rewards[:4] - rewards[4:]).mean().item(), abs=1e-5
        )
    for name, p in policy.model.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("loss", [{}, {"sft_weight": 0.5, "ld_alpha": 0.3}])
def test_accumulation_does_not_change_the_step(tmp_path: Path, loss: dict[str, Any]) -> None:
    """Pairs and chosen tokens are normalised over the step, however it is cut (6 pairs: 4 + 2)."""
    options = {**loss, "train_sampling_strategy": "sequential", "learning_rate": 3e-3}
    results = []
    for size, accumulation in ((6, 1), (4, 2), (1, 6)):
        _, rows = run_train(
            tmp_path,
            6,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        results.append([(r["loss"], r["grad_norm"], r["num_tokens"]) for r in rows])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_parts_change_nothing_but_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a batch runs in parts of bounded tokens; losses that couple pairs stay whole."""
    from dpo_kernels.train import step_batches

    whole = run_train(tmp_path, sft_weight=0.5)[1]
    monkeypatch.setattr(step_batches, "CPU_PART_TOKENS", 30)
    parts = run_train(tmp_path, sft_weight=0.5)[1]
    for a, b in zip(whole, parts, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)
    pairs, policy = random_pairs(4), tiny_policy()
    cut = step_batches.parts_of([2, 0, 1, 3], pairs, config_of(), policy)
    assert len(cut) > 1 and [i for part in cut for i in part] == [2, 0, 1, 3]
    assert step_batches.parts_of([2, 0], pairs, config_of(loss_type="aot"), policy) == [[2, 0]]


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "ipo"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "aot"},
        {"loss_type": "beta_dpo", "beta_dpo_keep": 0.5},
        {"loss_type": "odpo"},
        {"loss_type": "simpo", "beta": 2.0},
        {"loss_type": "orpo"},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"reference_free": True},
        {"loss_type": "tdpo1"},
        {"loss_type": ["tdpo2", "sft"], "loss_weights": [1.0, 0.1], "tdpo_alpha": 0.7},
        {"optim": "sgd"},
        {"optim": "rmsprop", "lr_scheduler_type": "constant"},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_losses_and_options_train(tmp_path: Path, options: dict[str, Any]) -> None:
    _, rows = run_train(tmp_path, max_steps=2, **options)
    assert len(rows) == 2 and all(math.isfinite(v) for row in rows for v in row.values())


def test_learns_and_metrics_have_trls_names(tmp_path: Path) -> None:
    _, rows = run_train(tmp_path, max_steps=20, learning_rate=5e-3, logging_steps=5)
    assert [r["step"] for r in rows] == [5, 10, 15, 20]
    assert set(rows[0]) == {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "grad_norm",
        "learning_rate",
        "epoch",
        "step",
        "num_tokens",
        "step_time",
        "tokens_per_s",
        "pairs_per_s",
        "padding_saved",
        "mem/peak",
    }
    assert rows[-1]["loss"] < 0.3 and rows[-1]["rewards/accuracies"] == 1.0
    assert rows[-1]["epoch"] == 10.0
    assert (tmp_path / "m.jsonl").read_text().splitlines() == [json.dumps(r) for r in rows]


def test_what_is_decayed_is_what_transformers_decays() -> None:
    """By layer and name: DoRA's magnitudes are vectors that are neither a norm nor a bias."""
    model: Any = tiny_model()
    model.lora_magnitude_vector = torch.nn.Parameter(torch.ones(4))
    model.scaled_bias = torch.nn.Parameter(torch.ones(4))
    optimizer = make_optimizer(model, config_of(weight_decay=0.3))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trainer = transformers.Trainer
    names = trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    found = {name for name, p in model.named_parameters() if decays[p] == 0.3}
    assert found == set(names) and "lora_magnitude_vector" in found and len(decays) > len(found)


def test_same_seed_same_run(tmp_path: Path) -> None:
    def losses(seed: int) -> list[float]:
        return [r["loss"] for r in run_train(tmp_path, seed=seed)[1]]

    first = losses(1)
    assert first == losses(1) and first != losses(2)


def test_order_of_pairs() -> None:
    config = config_of(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    plan = list(step_indices(10, config, 6))
    assert [len(i) for i, _ in plan] == [4, 4, 2] * 2
    for epoch in (plan[:3], plan[3:]):
        assert sorted(i for part, _ in epoch for i in part) == list(range(10))
    assert plan[0][0] != plan[3][0]
    assert [round(e, 3) for _, e in plan] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]


def test_evaluation_before_training_is_all_ties() -> None:
    policy = tiny_policy()
    data = data_of(policy, 10)
    result = evaluate(policy, data, config_of(), QUIET, "")
    assert result["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert result["eval_rewards/accuracies_ties_half"] == 0.5
    logps = plain_logps(policy.model, data.pairs, 0)
    assert result["eval_logps/accuracies"] == (logps[:10] > logps[10:]).double().mean().item()


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    policy = tiny_policy(sft_weight=0.7)
    data = data_of(policy, 10)
    with torch.no_grad():
        policy.head.weight.mul_(1.1)
    one, other = (
        evaluate(policy, data, config_of(sft_weight=0.7, per_device_eval_batch_size=n), QUIET, "")
        for n in (10, 3)
    )
    for key in one.keys() - {"eval_runtime"}:
        assert one[key] == pytest.approx(other[key], rel=1e-5), key


def test_step0_check_finds_another_reference() -> None:
    policy = tiny_policy()
    data = data_of(policy, 4)
    loss, expected = check_step0(policy, data, config_of(), range(4))
    assert loss == pytest.approx(math.log(2), abs=1e-5) and expected == pytest.approx(loss)
    with torch.no_grad():
        policy.head.weight.mul_(1.05)
    with pytest.raises(TrainingError, match="policy must equal the reference"):
        check_step0(policy, data, config_of(), range(4))


def test_not_finite_stops_before_the_weights_change() -> None:
    policy = tiny_policy()
    data = data_of(policy, 4)
    loss = PairLoss(policy, config_of())
    stepper = Stepper(policy.model, config_of(), 5)
    weights = [p.detach().clone() for p in policy.model.parameters()]
    out, batch = loss(data, range(4), 4, 9)
    (out.loss * math.nan).backward()
    with pytest.raises(TrainingError, match=r"step 7: the gradient norm is nan.*f:0, f:1"):
        stepper.step(out.loss.detach(), "step 7", batch.sources)
    with pytest.raises(TrainingError, match="the loss is inf and the gradient norm is nan"):
        stepper.step(torch.tensor(math.inf), "step 7", batch.sources)
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.model.parameters(), strict=True))


def test_sft_learns(tmp_path: Path) -> None:
    policy = tiny_policy()
    sequences = [TokenSequence(tuple(range(5, 25)), 3, f"f:{i}") for i in range(4)]
    config = config_of(max_steps=30, learning_rate=1e-2)
    metrics = MetricsFile(tmp_path / "m.jsonl")
    final = train_sft(policy, sequences, config, metrics, QUIET)
    assert final < 0.1 < metrics.rows[0]["loss"]
    assert policy.tokenizer.decode(range(8, 25)) == complete(policy, list(range(5, 8)), 17)


def test_plot_and_plain_step(tmp_path: Path) -> None:
    policy, rows = run_train(tmp_path)
    data = data_of(policy, 4)
    rows += [{"step": s, **evaluate(policy, data, config_of(), QUIET, "")} for s in (0, 3)]
    plot_run(rows, tmp_path / "p.png", "test")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    ours, plain = step_times(policy, data, [0, 2], config_of(), repeats=1)
    assert len(ours) == len(plain) == 1 and min(ours + plain) > 0


def test_real_preference_data() -> None:
    """Real conversations, where they are at hand: both layouts give the same loss and gradient."""
    file = Path(__file__).parents[3] / "shared" / "data" / "preferences_en.jsonl"
    if not file.is_file():
        pytest.skip(f"{file.name} is not beside this checkout")
    from dpo_kernels.data import read_pairs

    left_out = LeftOut()
    texts: list[PreferencePair] = read_pairs(file, left_out)
    pairs = tokenize_pairs(texts, byte_tokenizer(), 256, left_out)[:6]
    assert len(texts) + len(left_out.problems) >= 300 and pairs
    policy = tiny_policy(tiny_model(dtype=torch.float64), dtype="float64")
    losses = []
    for mode in ("padded", "prefix", "auto"):
        batch = make_batch(pairs, replace(policy.sharing, mode=mode), 0)
        out = dk.fused_linear_dpo_loss(
            policy.hidden(batch),
            labels=batch.labels,
            cu_seqlens=batch.cu_seqlens,
            shift=False,
            reference_free=True,
            **policy.head_arguments(),
        )
        losses.append(out.loss)
    assert torch.stack(losses).std() < 1e-10


def test_margins_of_rounding_are_ties() -> None:
    logps = torch.tensor([[-50.0, -40.0], [-60.0, -30.0]])
    rewards = torch.tensor([[2e-6, 0.3], [0.0, 0.0]])
    meter = PairMeter()
    meter.add(HeadOutput(loss=torch.tensor(0.6), pair_logps=logps, rewards=rewards), 0.1)
    found = meter.result()
    assert found["rewards/accuracies"] == 0.5 and found["rewards/accuracies_ties_half"] == 0.75
    meter = PairMeter()  # no reference: rewards are log-probs, which no rounding makes equal
    rewards = 1e-4 * logps
    meter.add(HeadOutput(loss=torch.tensor(0.6), pair_logps=logps, rewards=rewards), None)
    assert meter.result()["rewards/accuracies"] == 0.5
