"""ms-swift's trainer, patched: what its own forward gives, with gradients."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch

pytest.importorskip("swift", reason="make test-integrations has an environment for it")

from swift.rlhf_trainers.dpo_trainer import DPOTrainer, HFDPOTrainer

from dpo_kernels.integrations import patch_swift, patch_trl, swift, unpatch_swift
from dpo_kernels.integrations.frameworks import UnsupportedShape
from dpo_kernels.integrations.plain import PreferenceCollator
from dpo_kernels.models.options import FusedOptions

INIT, FORWARD = DPOTrainer.__init__, DPOTrainer.concatenated_forward


def stub(model, **options):
    """A trainer with what its forward reads."""
    made = object.__new__(DPOTrainer)
    made.__dict__ |= {
        "model": model,
        "accelerator": SimpleNamespace(unwrap_model=lambda m: m),
        "template": SimpleNamespace(
            sequence_parallel_size=1, padding_free=False, get_base_model=lambda m: m
        ),
        "args": SimpleNamespace(use_logits_to_keep=False, ld_alpha=None, **options),
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "loss_type": ["sigmoid"],
        "label_pad_token_id": -100,
        "fused": FusedOptions(),
    }
    made.args.ld_alpha = options.get("ld_alpha")
    return made


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("reference", [False, True])
def test_its_forward_gives_what_it_gave(ld_alpha, reference):
    tokenizer = tiny.tokenizer()
    rows = [{f"{k}_ids": tokenizer(r[k])["input_ids"] for k in r} for r in tiny.rows(4)]
    batch = PreferenceCollator(0)(rows)
    batch["labels"][0, -2] = -100
    start = tiny.model()
    results = []
    for forward in (FORWARD, swift.overrides()["concatenated_forward"](FORWARD)):
        model = copy.deepcopy(start)
        made = stub(model)
        made.args.ld_alpha = ld_alpha
        out = forward(made, model, dict(batch), is_ref_model=reference)
        (out["chosen_logps"].sum() - 2 * out["rejected_logps"].square().sum()).backward()
        results.append((out, {k: p.grad for k, p in model.named_parameters()}))
    (theirs, grads), (ours, ours_grads) = results
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        if reference and "logits" in key:
            continue  # nothing reads them
        assert torch.allclose(value.float(), ours[key].float(), atol=1e-4, rtol=1e-5), key
    for key, grad in grads.items():
        assert (grad - ours_grads[key]).abs().max() < 2e-5 * (1 + grad.abs().max()), key


def test_the_patch_comes_off_and_trls_init_stays_away():
    """It deletes TRL's `__init__` when it is imported; nothing of ours puts that back."""
    with patch_swift():
        assert DPOTrainer.__init__ is not INIT
    assert DPOTrainer.__init__ is INIT and DPOTrainer.concatenated_forward is FORWARD
    assert "__init__" not in vars(HFDPOTrainer)
    with pytest.raises(UnsupportedShape, match=r"use patch_swift\(\) alone"):
        patch_trl()
    assert "__init__" not in vars(HFDPOTrainer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"packing": True, "padding_free": True}, "packing=true, padding_free=true"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size=2"),
    ],
)
def test_what_is_not_done_is_refused_by_name(changes, said):
    made = stub(tiny.model())
    made.model_meta = SimpleNamespace(is_multimodal=False)
    made.template = SimpleNamespace(
        **{"packing": False, "padding_free": False, "sequence_parallel_size": 1, **changes}
    )
    with pytest.raises(ValueError, match=f"does not take {said}"):
        swift._refuse(made)


def test_ipo_of_a_release_that_divides_in_its_forward_is_refused(monkeypatch):
    """Before 4.5.3: there ours would be the loss of sums."""
    made = stub(tiny.model())
    made.model_meta = SimpleNamespace(is_multimodal=False)
    made.template.packing, made.loss_type = False, ["sigmoid", "ipo"]
    swift._refuse(made)
    monkeypatch.delattr(DPOTrainer, "_get_ipo_sequence_logps")
    with pytest.raises(ValueError, match="does not take loss_type=ipo"):
        swift._refuse(made)


def test_unpatching_without_a_patch_is_nothing():
    unpatch_swift()
