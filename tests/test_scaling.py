"""docs/scaling.md: what its script draws, and the numbers that anybody can check."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import scaling  # noqa: E402


def test_the_page_is_current():
    assert scaling.PAGE.read_text() == scaling.page(), "run tools/scaling.py"


@pytest.mark.parametrize(("model", "billions"), [(0, 8.03), (1, 70.55)])
def test_the_models_have_the_weights_they_are_known_for(model, billions):
    m = scaling.MODELS[model]
    assert (m.trunk + m.head) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_bytes_of_a_sharded_head_do_not_depend_on_the_vocabulary_in_the_node():
    small, large = (
        scaling.exchange(scaling.Traffic(), scaling.Model("x", 4096, 2, 8192, 1024, V), 1000.0)
        for V in (32000, 256000)
    )
    assert small.inside == large.inside
    gathered = [
        scaling.head_traffic(scaling.Model("x", 4096, 2, 8192, 1024, V), 8, None).inside
        for V in (32000, 256000)
    ]
    assert gathered[1] == 8 * gathered[0]


def test_the_break_even_in_a_node_is_near_an_eighth_of_the_vocabulary():
    m = scaling.MODELS[0]
    assert scaling.break_even(m, 8) == pytest.approx(m.V / 8, rel=0.02)
