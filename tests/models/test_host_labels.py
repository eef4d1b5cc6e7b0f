"""The trainer's host tells the head what it knows, so that the device is not asked for it."""

from __future__ import annotations

import pytest
import tiny

pytest.importorskip("transformers", reason="pip install transformers")

from dpo_kernels.data import TokenPair
from dpo_kernels.models import forward
from dpo_kernels.train.config import load_config
from dpo_kernels.train.model import prepare_policy
from dpo_kernels.train.reference import PairData
from dpo_kernels.train.step_loss import PairLoss

PAIRS = [TokenPair((5, 6, 7), (8, 9, 10), (8, 11), "a"), TokenPair((5,), (9,), (8, 11, 12), "b")]


def test_labels_stay_on_the_host_and_lengths_are_given(monkeypatch):
    """The head gets labels of the host, and is told how many are scored."""
    given = []
    own = forward._scored
    monkeypatch.setattr(forward, "_scored", lambda *a: (given.append(own(*a)), given[-1])[1])
    config = load_config({"device": "cpu", "reference_free": True})
    policy = prepare_policy(tiny.model(), tiny.tokenizer(), config, lambda _: None)
    given.clear()
    batch = policy.batch(PAIRS).to("meta")
    assert batch.calls[0].input_ids.is_meta and batch.rows.is_meta
    assert batch.labels.device.type == batch.cu_seqlens.device.type == "cpu"
    loss = PairLoss(policy, config)
    out, _ = loss(PairData(PAIRS), range(2), 2, 4)
    assert given[0]["scored_lengths"] == [3, 1, 2, 3]
    assert given[0]["labels"].device.type == "cpu" and not given[0]["shift"]
    assert out.strategy == "streaming"
