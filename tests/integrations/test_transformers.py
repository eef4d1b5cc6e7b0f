"""transformers.Trainer, a plain loop and the loss callables against plain torch."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from torch.nn.functional import logsigmoid

import dpo_kernels as dk

pytest.importorskip("accelerate", reason="pip install accelerate")

from transformers import Trainer, TrainingArguments

from dpo_kernels.integrations import hf_trainer, plain
from dpo_kernels.integrations.transformers import (
    FusedDPOMixin,
    FusedDPOTrainer,
    PreferenceCollator,
    WrongReference,
)
from dpo_kernels.models.attached import attach_head, detach_head
from dpo_kernels.models.head_check import check_head


def examples(n=8, seed=0, **columns):
    encode = tiny.tokenizer()
    rows = []
    for row in tiny.rows(n, seed, **columns):
        ids = {f"{k}_ids": encode(row[k])["input_ids"] for k in ("prompt", "chosen", "rejected")}
        rows.append(ids | {k: row[k] for k in columns})
    return rows


def batches(n_steps, size=4, **columns):
    data = examples(size * n_steps, **columns)
    collate = PreferenceCollator(0)
    return [collate(data[i : i + size]) for i in range(0, len(data), size)]


def plain_logps(model, batch):
    """[2B] sums of the completions' log-probs, by log_softmax of all logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * (labels != -100)).sum(1)


# Losses are logged with four digits by transformers 4.
def arguments(folder, **options):
    common = dict(
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    return TrainingArguments(str(folder), **{**common, **options})


class InOrder(FusedDPOTrainer):
    """Batches as the data has them, in any version of transformers."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder, model=None, ref_model="copy", data=None, **options):
    model = tiny.model() if model is None else model
    own = {k: options.pop(k) for k in ("loss_options", "fused", "eval_dataset") if k in options}
    return InOrder(
        model=model,
        ref_model=copy.deepcopy(model) if ref_model == "copy" else ref_model,
        args=arguments(folder, **options),
        train_dataset=examples(20) if data is None else data,
        data_collator=PreferenceCollator(0),
        **own,
    )


def test_trainer_is_plain_torch(tmp_path):
    """Five steps of AdamW in float64: the same losses and weights as a loop over log_softmax."""
    policy = tiny.model(dtype=torch.float64)
    by_hand, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    made = trainer(tmp_path, policy, loss_options={"beta": 0.3})
    made.train()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=2e-3, weight_decay=0.0)
    losses = []
    for batch in batches(5):
        with torch.no_grad():
            ref = plain_logps(reference, batch)
        chosen, rejected = (plain_logps(by_hand, batch) - ref).chunk(2)
        loss = -logsigmoid(0.3 * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    history = [row for row in made.state.log_history if "loss" in row]
    assert [row["loss"] for row in history] == pytest.approx(losses, abs=1e-4)
    for name, value in by_hand.state_dict().items():
        # torch's fused AdamW, which the Trainer takes, rounds otherwise than its plain one
        assert (made.model.state_dict()[name] - value).abs().max() < 1e-9, name


def test_metrics_have_trls_names(tmp_path):
    made = trainer(tmp_path, eval_dataset=examples(6), eval_strategy="steps", eval_steps=5)
    made.train()
    row = next(r for r in made.state.log_history if "loss" in r)
    names = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "mean_token_accuracy",
        "num_tokens",
    }
    assert names <= row.keys()
    evaluation = next(r for r in made.state.log_history if "eval_loss" in r)
    assert {f"eval_{n}" for n in names} <= evaluation.keys()


def test_step0(tmp_path):
    with pytest.raises(WrongReference, match="check_reference"):
        trainer(tmp_path, ref_model=tiny.model(seed=1)).train()
    made = trainer(tmp_path, ref_model=tiny.model(seed=1), fused={"check_reference": False})
    made.train()
    first = trainer(tmp_path, loss_options={"loss_type": "ipo"})
    first.train()
    assert first.state.log_history[0]["loss"] == pytest.approx(25.0, rel=1e-4)
    no_reference = trainer(tmp_path, ref_model=None)
    with pytest.raises(ValueError, match="no reference"):
        no_reference.train()


def test_reference_logps_and_rows_of_the_batch(tmp_path):
    model = tiny.model()
    batch = PreferenceCollator(0)(examples(4))
    ref = plain_logps(model, batch).detach()
    given = [
        {**row, "ref_chosen_logps": float(ref[i]), "ref_rejected_logps": float(ref[4 + i])}
        for i, row in enumerate(examples(4, margin=lambda i: 0.2 * i))
    ]
    made = trainer(tmp_path, model, ref_model=None, data=given, max_steps=1)
    made.train()
    margins = torch.tensor([0.0, 0.2, 0.4, 0.6])
    wanted = -logsigmoid(-margins).mean().item()  # at zero log-ratios, offset by the margin
    assert made.state.log_history[0]["loss"] == pytest.approx(wanted, abs=1e-4)


def test_a_mixin_over_ones_own_trainer(tmp_path):
    class Mine(FusedDPOMixin, Trainer):
        pass

    made = Mine(
        model=tiny.model(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=examples(8),
        data_collator=PreferenceCollator(0),
        loss_options={"loss_type": "simpo"},
    )
    made.train()
    assert made.state.global_step == 2


@tiny.NEEDS_SEGMENTS
def test_plain_loop_and_prefix_sharing():
    losses = []
    for share in (False, True):
        model = tiny.model()
        reference = copy.deepcopy(model)
        plain.attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for step, batch in enumerate(batches(3)):
            fused = {"share_prefix": share}
            ref = plain.reference_logps(reference, batch, fused=fused)
            out = plain.dpo_step(model, batch, ref_logps=ref, beta=0.1, fused=fused)
            if step == 0:
                plain.check_reference(model, out, batch, beta=0.1)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(out.loss.item())
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] != pytest.approx(losses[0][0], abs=1e-3)


@tiny.NEEDS_SEGMENTS
def test_prefix_sharing_takes_left_padding_and_refuses_images():
    model = tiny.model()
    plain.attach(model)
    batch = batches(1)[0]
    mask = batch["attention_mask"].flip(1)
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    left = {**batch, "attention_mask": mask, "labels": labels}
    one, two = (
        plain.reference_logps(model, left, fused={"share_prefix": share}) for share in (False, True)
    )
    keep = mask[:, 1:].bool() & mask[:, :-1].bool()  # a row's first token is scored from padding
    torch.testing.assert_close(one[keep], two[keep], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="pixel_values"):
        plain.reference_logps(
            model, {**batch, "pixel_values": torch.zeros(1)}, fused={"share_prefix": True}
        )


def test_attach_and_detach_leave_the_model_as_it_was():
    model = tiny.model()
    before = model.forward
    ids = torch.tensor([[5, 6, 7]])
    logits = model(ids).logits
    attach_head(model)
    attach_head(model)
    assert torch.equal(model(ids).logits, logits)
    other = copy.deepcopy(model)  # a copy's head is its own
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert torch.equal(model(ids).logits, logits)
    assert not other(ids).logits.any()
    check_head(other)
    detach_head(model)
    assert model.forward == before


def test_an_unknown_head_is_an_error():
    model = tiny.model()
    plain_forward = model.forward

    def scaled(*args, **kwargs):
        out = plain_forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match="differ by"):
        plain.attach(model)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo_sum", "hinge"])
def test_loss_callables(loss):
    """torchtune's four log-probs; torchtitan's predictions and labels."""
    torch.manual_seed(0)
    logps = torch.randn(4, 3)
    losses, chosen, rejected = plain.PreferenceLoss(loss_type=loss, beta=0.2)(*logps)
    D = (logps[0] - logps[2]) - (logps[1] - logps[3])
    wanted = {
        "sigmoid": -logsigmoid(0.2 * D),
        "ipo_sum": (D - 2.5) ** 2,
        "hinge": (1 - 0.2 * D).relu(),
    }[loss]
    assert torch.allclose(losses, wanted, atol=1e-6)
    assert torch.allclose(chosen, 0.2 * (logps[0] - logps[2]))
    assert torch.allclose(rejected, 0.2 * (logps[1] - logps[3]))

    pred = torch.randn(2, 5, 11, requires_grad=True)
    labels = torch.randint(0, 11, (2, 5))
    labels[:, :2] = -100
    got = plain.LogitsLoss(loss_type=loss, beta=0.2)(pred, labels, ref_logps=torch.zeros(2))
    picked = pred.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    sums = (picked * (labels != -100)).sum(1)
    direct = dk.preference_loss(*sums.split(1), *torch.zeros(2).split(1), loss_type=loss, beta=0.2)
    assert torch.allclose(got, direct.loss, atol=1e-5)
    got.backward()
    assert pred.grad is not None and not pred.grad[:, :2].any()


@pytest.mark.parametrize(("autocast", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_precision_is_the_one_in_force(tmp_path, monkeypatch, autocast, wanted):
    """fp16 that accelerate leaves off on a CPU loosened the check of the reference 200 times."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # an older TrainingArguments sets it
    made = trainer(tmp_path, bf16=autocast)
    monkeypatch.setattr(type(made.accelerator), "mixed_precision", "bf16" if autocast else "fp16")
    assert hf_trainer.model_dtype(made) is wanted
