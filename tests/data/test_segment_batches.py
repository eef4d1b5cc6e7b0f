"""Which pairs go together into a call, and how they are laid out."""

from __future__ import annotations

import pytest

from dpo_kernels.data import Sharing, TokenPair, make_batch
from dpo_kernels.data.batches import within_budget
from dpo_kernels.data.segments import Segment, Segments


def test_within_budget_is_first_fit_and_deterministic() -> None:
    sizes = [5, 9, 3, 4, 12, 2]
    groups = within_budget([10, 11, 12, 13, 14, 15], lambda i: sizes[i - 10], 10)
    assert sorted(i for g in groups for i in g) == list(range(10, 16))
    assert groups == [[10, 13], [11], [12, 15], [14]]  # one above the budget is alone
    assert all(sum(sizes[i - 10] for i in g) <= 10 for g in groups if g != [14])


def test_auto_counts() -> None:
    equal = [TokenPair((5, 6), (7, 8), (9, 8), "a")] * 2
    calls = make_batch(equal, Sharing("auto", 0.0, None), 0).calls
    assert calls[0].segments is not None  # shared: 6 tokens in place of 8
    alone = [TokenPair((), (7, 8, 9, 10), (9, 8, 7, 6), "a")] * 2
    assert make_batch(alone, Sharing("auto", 0.0, None), 0).calls[0].segments is None
    ragged = [TokenPair((), (7,) * 4, (9,) * 20, "a")] * 2
    assert make_batch(ragged, Sharing("auto", 0.0, None), 0).calls[0].segments is not None


def test_segments_must_see_the_start_of_an_earlier_one() -> None:
    for parts in (
        [Segment(3, 0, 1)],
        [Segment(3), Segment(2, 0, 4)],
        [Segment(3), Segment(2, 0, 0)],
    ):
        with pytest.raises(ValueError, match="must see the start of an earlier one"):
            Segments(parts)
    assert Segments([Segment(3), Segment(2, 0, 1)]).entries() == 6 + 2 + 3
