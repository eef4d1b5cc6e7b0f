"""scored_lengths=: what the host would wait for the device to learn."""

import pytest
import torch
from linear_cases import BUDGETS, IGNORE, B, T, V, labels_of, pack, tensors

import dpo_kernels as dk
from dpo_kernels.inputs.layout import Layout
from dpo_kernels.ops import linear_head


def test_nothing_is_counted_where_the_host_knows(monkeypatch):
    """As labels on a GPU are: not to be looked at. Values and gradients stay the same."""
    hidden, weight, _, *ref = tensors()
    labels = labels_of()
    lengths = Layout.of(labels, None, shift=True, ignore_index=IGNORE, V=V).scored_counts()
    given = {"ref_hidden": ref[0], "ref_weight": ref[1], "memory_budget": BUDGETS["tight"]}

    def run(**options):
        results = []
        for more in ({}, {"loss_type": "aot"}, {"loss_type": "tdpo1", "reduction": "none"}):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            out = dk.fused_linear_dpo_loss(*leaves, labels, **given, **more, **options)
            results += [out.loss, *torch.autograd.grad(out.loss.sum(), leaves)]
        results.append(dk.linear_sequence_logps(hidden, weight, labels, **options))
        return results

    expected = run()
    monkeypatch.setattr("dpo_kernels.inputs.checks.readable", lambda value: False)
    monkeypatch.setattr("dpo_kernels.ops.linear_logps.count_scored", refuse)
    monkeypatch.setattr(Layout, "scored_counts", refuse)
    for form in (lengths, lengths.to(torch.int32), lengths.tolist()):
        for a, b in zip(run(scored_lengths=form), expected, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="waits"):
        run()


def refuse(*_):
    raise AssertionError("the host waits for the device")


def test_packed_and_common_prefix():
    hidden, weight, _, *ref = tensors()
    labels = torch.randint(0, V, (2 * B, T))
    lengths = [9, 7, 2, 9, 8, 9, 5, 9]
    labels[B:, :2] = labels[:B, :2]
    for i, n in enumerate(lengths):
        labels[i, n:] = IGNORE
    cu = torch.tensor([0, *lengths]).cumsum(0)
    x, y, r = (pack(v, lengths) for v in (hidden, labels, ref[0]))
    for options in ({}, {"drop_common_prefix": True}):
        results = [
            dk.fused_linear_dpo_loss(
                x.clone().requires_grad_(),
                weight.clone().requires_grad_(),
                y,
                cu_seqlens=cu,
                ref_hidden=r,
                ref_weight=ref[1],
                shift=False,
                **more,
                **options,
            ).loss
            for more in ({}, {"scored_lengths": lengths})
        ]
        assert torch.equal(*results)


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([1] * (2 * B), ValueError, "sequence 0 has 5, got 1"),
        ([1] * B, ValueError, "must be 8 counts"),
        ([-1] * (2 * B), ValueError, "must be 8 counts"),
        (torch.ones(B, dtype=torch.long), ValueError, r"shape \[8\]"),
        (torch.ones(2 * B), ValueError, "must be torch.int32 or torch.int64"),
        ([1.0] * (2 * B), TypeError, "must be integers"),
        (3, TypeError, "must be integers"),
    ],
    ids=str,
)
def test_refused(lengths, error, words):
    hidden, weight, *_ = tensors()
    labels = labels_of()
    labels[0] = IGNORE
    labels[0, 1:6] = 3
    with pytest.raises(error, match=words):
        dk.linear_sequence_logps(hidden, weight, labels, scored_lengths=lengths)
    with pytest.raises(error, match=words):
        dk.fused_linear_dpo_loss(
            hidden, weight, labels, scored_lengths=lengths, reference_free=True
        )


def test_labels_on_the_cpu_move_to_the_hidden_states():
    """The meta device stands for a GPU: what is computed there has no values to wait for."""
    labels = labels_of()
    layout = Layout.of(labels, None, shift=True, ignore_index=IGNORE, V=V)
    there = layout.on(torch.device("meta"))
    assert there.targets.device.type == "meta"
    assert list(there.lengths) == layout.scored_counts().tolist()
    assert there.count == linear_head.count_scored(layout.targets, IGNORE)
