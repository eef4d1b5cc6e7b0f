"""What would train at log 2 for ever is found at or before step 1, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import random_pairs
from test_train import QUIET, config_of, tiny_model, tiny_policy

from dpo_kernels.data import TokenPair
from dpo_kernels.models.falling import FallingWatch
from dpo_kernels.models.reference_cache import sequence_key
from dpo_kernels.models.step1 import FirstStep, FirstStepError, check_rows
from dpo_kernels.train.console import Console
from dpo_kernels.train.loop import train
from dpo_kernels.train.metrics import MetricsFile
from dpo_kernels.train.optim import TrainingError
from dpo_kernels.train.reference import PairData, Reference, open_cache, with_reference


def start(
    tmp_path: Path, pairs: Any = None, policy: Any = None, data: Any = None, **options: Any
) -> Any:
    policy = policy or tiny_policy()
    pairs = random_pairs(8) if pairs is None else pairs
    config = config_of(max_steps=3, **options)
    data = data or with_reference(policy, pairs, config, QUIET, "pairs")
    return train(policy, data, None, config, MetricsFile(tmp_path / "m.jsonl"), QUIET)


def test_wrong_reference(tmp_path: Path) -> None:
    other = tiny_model()
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.3)
    pairs = random_pairs(8)
    data = with_reference(tiny_policy(other), pairs, config_of(), QUIET, "pairs")
    with pytest.raises(TrainingError, match="another reference model"):
        start(tmp_path, data=data)


def test_stale_cache(tmp_path: Path) -> None:
    """Values of other weights under this name: no key can tell, step 0 does."""
    pairs, policy = random_pairs(8), tiny_policy()
    config = config_of(reference_cache=str(tmp_path / "cache"))
    cache = open_cache(policy, config, QUIET)
    assert cache is not None
    for pair in pairs:
        sequences = pair.sequences
        values = [torch.full((s.num_scored,), -1.0) for s in sequences]
        cache.put([sequence_key(s) for s in sequences], values)
    cache.refresh()
    data = with_reference(policy, pairs, config, QUIET, "pairs", cache=cache)
    with pytest.raises(TrainingError, match=r"stale reference log-probs \(a cache\)"):
        start(tmp_path, policy=policy, data=data)


def test_masked_labels(tmp_path: Path) -> None:
    pairs = [TokenPair((5, 6), (7, 8), (9,), "f:1", unscored=(((2, 4),), ((2, 3),)))] * 4
    with pytest.raises(TrainingError, match="labels are all masked"):
        start(tmp_path, pairs, data=PairData(pairs, None), loss_type="simpo")


def test_doubled_end_token(tmp_path: Path) -> None:
    eos = tiny_policy().tokenizer.eos_token_id
    pairs = [TokenPair((5, 6), (7 + i, eos, eos), (9, eos, eos), f"f:{i}") for i in range(8)]
    with pytest.raises(TrainingError, match=r"end token \(EOS, id 2\) twice \(f:\d\)"):
        start(tmp_path, pairs)
    assert start(tmp_path, pairs, check_first_step=False).steps == 3


def test_learning_rate_of_zero(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 1: the learning rate is 0"):
        start(tmp_path, learning_rate=0.0)
    assert start(tmp_path, learning_rate=1e-4, warmup_steps=2).steps == 3


def merged_adapter() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"])
    return peft.get_peft_model(tiny_model(), options)


def test_merged_adapter() -> None:
    model = merged_adapter()
    model.merge_adapter()
    loss = model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()
    from dpo_kernels.models.step1 import check_connected

    with pytest.raises(FirstStepError, match="an adapter is merged into its weights"):
        check_connected(model, loss)
    frozen = merged_adapter().merge_and_unload()
    with pytest.raises(FirstStepError, match=r"every weight is frozen.*merged"):
        FirstStep(frozen).after_backward()


def one_step(model: torch.nn.Module, rate: float = 1e-2, **options: Any) -> FirstStep:
    watch = FirstStep(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    loss = model(input_ids=torch.tensor([[5, 6, 7]])).logits.float().logsumexp(-1).sum()
    loss.backward()
    watch.after_backward()
    optimizer.step()
    watch.after_step(optimizer)
    return watch


def test_a_detached_head() -> None:
    model = tiny_model()
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    with pytest.raises(FirstStepError, match="the head alone has a gradient"):
        one_step(model)
    assert one_step(tiny_model()).done


def test_weights_that_do_not_move() -> None:
    """bf16 rounding; an optimizer that holds other weights."""
    with pytest.raises(FirstStepError, match="too small for bfloat16"):
        one_step(tiny_model(dtype=torch.bfloat16), 1e-9)
    model = tiny_model()
    watch = FirstStep(model)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).sum().backward()
    watch.after_backward()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(FirstStepError, match="the optimizer does not hold them"):
        watch.after_step(optimizer)


def test_weights_without_a_gradient_are_named() -> None:
    model = tiny_model()
    model.register_parameter("stray", torch.nn.Parameter(torch.ones(3)))
    watch = one_step(model)
    assert any("have no gradient" in text and "stray" in text for text in watch.warnings)


def test_rows_of_a_padded_batch() -> None:
    labels = torch.full((4, 6), -100)
    with pytest.raises(FirstStepError, match="all masked"):
        check_rows(labels)
    labels[:, 2:5] = torch.tensor([7, 1, 1])
    with pytest.raises(FirstStepError, match=r"4 of 4 completions.*twice"):
        check_rows(labels, [1])
    labels[1:, 4] = -100
    check_rows(labels, [1])


def test_falling_log_probs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = FallingWatch()
    ratios = torch.tensor([[-9.0, -2.0], [-12.0, -6.0]])
    watch.add(ratios * 0.1, ratios - 20.0, 0.1, ["f:1", "f:2"])
    text = watch.look()
    assert "fall together (by 5.5 and 9.0 nats" in text and "f:1 (-9.0), f:2 (-2.0)" in text
    assert "dpop" in text
    watch.add(ratios, ratios, 0.1, ["f:1"])
    assert watch.look() == ""  # said once


def test_falling_log_probs_warn_or_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FallingWatch, "look", lambda watch: "they fall together")
    pairs, policy = random_pairs(4), tiny_policy()
    config = config_of(max_steps=1)
    data = with_reference(policy, pairs, config, QUIET, "pairs")
    train(policy, data, None, config, MetricsFile(tmp_path / "m"), Console())
    assert "warning: step 1: they fall together" in capsys.readouterr().out
    stop = config_of(max_steps=1, on_falling_logps="stop")
    policy = tiny_policy()
    data = with_reference(policy, pairs, stop, QUIET, "pairs")
    with pytest.raises(TrainingError, match=r"fall together .*on_falling_logps warn"):
        train(policy, data, None, stop, MetricsFile(tmp_path / "n"), QUIET)


def test_a_reference_that_follows(tmp_path: Path) -> None:
    """TR-DPO: soft and hard copies of the policy, every so many steps."""
    from dpo_kernels.train.reference import LiveReference, Referee

    for share in (0.5, 1.0):
        policy, pairs = tiny_policy(), random_pairs(8)
        begin = {k: v.clone() for k, v in policy.model.named_parameters()}
        config = config_of(
            max_steps=2,
            sync_ref_model=True,
            ref_model_sync_steps=2,
            ref_model_mixup_alpha=share,
            reference_cache=str(tmp_path / "none"),
        )
        referee = Referee(policy, config, QUIET)
        data = referee.data(pairs, "pairs")
        assert isinstance(data.reference, LiveReference) and referee.cache is None
        start(tmp_path, policy=policy, data=data, **{"ref_model_sync_steps": 2})
        now = dict(policy.model.named_parameters())
        data.reference.after_step(policy, 4)
        for name, mine in data.reference.reference.model.named_parameters():
            if share == 1.0:
                torch.testing.assert_close(mine, now[name])
            else:
                assert not torch.equal(mine, begin[name]) and not torch.equal(mine, now[name])
        assert not (tmp_path / "none").exists()


def test_live_references_are_cached_as_rows_come(tmp_path: Path) -> None:
    from dpo_kernels.train.reference import Referee

    policy, pairs = tiny_policy(), random_pairs(8)
    config = config_of(reference_cache=str(tmp_path))
    plain = with_reference(policy, pairs, config, QUIET, "pairs").reference
    referee = Referee(policy, config, QUIET)
    live = referee.data(pairs, "pairs", live=True).reference
    assert isinstance(plain, Reference) and live is not None and referee.cache is not None
    device = torch.device("cpu")
    for group in ([0, 3], [5, 1], [0, 3]):
        torch.testing.assert_close(live.of(group, device), plain.of(group, device))
    assert referee.cache.counts.computed == 8


def test_another_checkpoint_is_the_reference(tmp_path: Path) -> None:
    from dpo_kernels.train.config import UserError
    from dpo_kernels.train.reference import Referee

    other = tiny_policy(tiny_model(initializer_range=0.1))
    folder = tmp_path / "other"
    other.model.save_pretrained(folder)
    other.tokenizer.save_pretrained(folder)
    policy, pairs = tiny_policy(), random_pairs(8)
    config = config_of(ref_model_name_or_path=str(folder), max_steps=1, reference_cache=None)
    referee = Referee(policy, config, QUIET)
    data = referee.data(pairs, "pairs")
    expected = with_reference(other, pairs, config, QUIET, "pairs").reference
    device = torch.device("cpu")
    assert data.reference is not None and expected is not None
    torch.testing.assert_close(data.reference.of([0, 5], device), expected.of([0, 5], device))
    train(policy, data, None, config, MetricsFile(tmp_path / "m"), QUIET)
    stranger = tiny_policy().tokenizer
    stranger.add_tokens(["strange"])
    stranger.save_pretrained(folder)
    with pytest.raises(UserError, match="another tokenizer than the model"):
        Referee(policy, config, QUIET)


def test_label_smoothing_of_each_row_reaches_the_loss() -> None:
    from dataclasses import replace

    from dpo_kernels.train.step_loss import PairLoss

    plain, policy = random_pairs(4), tiny_policy()
    pairs = [replace(p, label_smoothing=e) for p, e in zip(plain, (0.1, None, 0.3, 0.0))]  # noqa: B905
    config = config_of(label_smoothing=0.2)
    other = tiny_model(initializer_range=0.1)
    data = with_reference(tiny_policy(other), pairs, config, QUIET, "pairs")
    got, _ = PairLoss(policy, config)(data, range(4), 4, 9)
    total = 0.0
    for i, e in enumerate((0.1, 0.2, 0.3, 0.0)):
        alone = PairLoss(policy, config_of(label_smoothing=e))
        out, _ = alone(PairData(plain, data.reference), [i], 4, 9)
        total += float(out.loss)
    assert float(got.loss) == pytest.approx(total, rel=1e-5)
