"""Labels as targets and scored rows in their places: the compiled calls beside plain torch."""

import pytest
import torch

from dpo_kernels.backends import load
from dpo_kernels.inputs.layout import Layout

cpu = load("cpu")
# Nothing at all, one row, rows of which none is scored, more bytes than one thread copies.
SHAPES = ((0, 3), (2, 0), (2, 1), (4, 8), (6, 700))


def labels_of(S, T, ignore):
    labels = torch.randint(0, 9, (S, T))
    labels[torch.rand(S, T) < 0.4] = ignore
    labels[S // 2 : S // 2 + 1] = ignore
    return labels


@pytest.mark.parametrize("ignore", (-100, 3))
@pytest.mark.parametrize("shift", (True, False))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_targets_are_those_of_torch(shape, shift, ignore, monkeypatch):
    labels = labels_of(*shape, ignore)
    given = {"shift": shift, "ignore_index": ignore, "V": 9}
    made = Layout.of(labels, None, **given)
    monkeypatch.setattr("dpo_kernels.inputs.layout.usable", lambda name: False)
    plain = Layout.of(labels, None, **given)
    assert torch.equal(made.targets, plain.targets)
    assert made.lengths == tuple(plain.scored_counts().tolist()) and plain.lengths is None


def test_labels_that_lie_apart():
    labels = labels_of(4, 16, -100)[:, ::2]
    made = Layout.of(labels, None, shift=True, ignore_index=-100, V=9)
    copy = Layout.of(labels.contiguous(), None, shift=True, ignore_index=-100, V=9)
    assert torch.equal(made.targets, copy.targets)


@pytest.mark.parametrize("bad", (9, -1, 2**62))
def test_a_label_out_of_range_is_named(bad):
    labels = labels_of(4, 8, -100)
    labels[2, 0] = bad  # unscored under shift, and wrong all the same
    with pytest.raises(ValueError, match=rf"got {bad} at \[2, 0\]"):
        Layout.of(labels, None, shift=True, ignore_index=-100, V=9)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_rows_are_packed_and_put_back(shape, packed, dtype):
    labels = labels_of(*shape, -100)
    if packed:
        cu = torch.arange(0, labels.numel() + 1, max(shape[1], 1))
        layout = Layout.of(labels.view(-1), cu, shift=True, ignore_index=-100, V=9)
    else:
        layout = Layout.of(labels, None, shift=True, ignore_index=-100, V=9)
    y, lengths = layout.targets, layout.scored_lengths()
    n, whole = sum(lengths), sum(lengths) + 5
    hidden = torch.randn(*y.shape, 37).to(dtype)
    places, rows = cpu.packed(y, layout.cu_seqlens, -100, n, whole, hidden)
    index, boundaries, targets = places.split([whole, len(lengths) + 1, n])
    scored = (y != -100).view(-1)
    assert torch.equal(index[:n], scored.nonzero().view(-1))
    assert boundaries.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert torch.equal(targets, y.view(-1)[scored])
    assert torch.equal(rows, hidden.view(-1, 37)[index])
    back = cpu.rows_back(rows[:n], places, hidden.shape)
    assert torch.equal(back, torch.where(scored.view(*y.shape, 1), hidden, 0))
