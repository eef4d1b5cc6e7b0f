"""Charts by their geometry: nothing hides anything, no value is lost, every axis has a unit."""

import math
import random
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from page_parts import SVG, overlaps, texts

from dpo_kernels.report.bars import Bar, bar_chart
from dpo_kernels.report.chart_parts import file_of, spread_out
from dpo_kernels.report.charts import Chart, Series, line_chart, thinned
from dpo_kernels.report.numbers_text import number, seconds, size, steps_between, tick_texts


def chart(*series: Series, **options) -> ElementTree.Element:
    given = {"title": "a chart", "x": "optimizer step", "y": "nats", "whole_x": True, **options}
    return ElementTree.fromstring(line_chart(Chart(series=series, **given)))


def ramp(label: str, style: int, end: float, n: int = 40, scale: float = 1.0) -> Series:
    return Series(label, [(float(i), end * scale * i / n) for i in range(1, n + 1)], style)


CHARTS = {
    "one line": chart(ramp("training", 0, 1.0)),
    "one point": chart(Series("training", [(1.0, 0.5)], 0)),
    "the same end eight times": chart(*(ramp(f"run {i}", i, 1.0) for i in range(8))),
    "twelve runs of long names": chart(
        *(ramp(f"runs/2026-11-{i:02d}/{'x' * 60}", i, 1.0 + i / 50) for i in range(12))
    ),
    "large steps": chart(ramp("a", 0, 3e5, scale=1e3), ramp("b", 1, -3e5, scale=1e3)),
    "a hundred thousand": chart(Series("a", [(float(i), i % 7) for i in range(100_000)], 0)),
    "tiny values": chart(ramp("a", 0, 3e-7), ramp("b", 1, 2e-7)),
    "negative": chart(ramp("a", 0, -123.456), ramp("b", 1, -123.4), ramp("c", 2, -1.5)),
    "a chance line at the ends": chart(
        ramp("a", 0, 0.5), ramp("b", 1, 0.5), given=((0.5, "chance"),), limits=(0.0, 1.0)
    ),
    "intervals": chart(
        Series("a", [(1.0, 0.5), (2.0, 0.6)], 0, spread=[(0.4, 0.6), (0.5, 0.7)]),
        Series("b", [(1.0, 0.5), (2.0, 0.5)], 1, spread=[(0.4, 0.6), (0.4, 0.6)]),
    ),
    "logarithms": chart(
        Series("ours", [(256.0, 0.02), (4096.0, 15.0), (65536.0, 300.0)], 1),
        Series("peer", [(256.0, 0.4), (4096.0, 40.0), (65536.0, 1000.0)], 0),
        log_x=2.0,
        log_y=True,
        ticks_x=(256, 512, 1024, 2048, 4096, 8192, 16384, 65536),
    ),
    "not finite": chart(
        Series("a", [(1.0, 1.0), (2.0, math.nan), (3.0, 2.0), (4.0, math.inf), (5.0, 2.0)], 0)
    ),
    "bars": ElementTree.fromstring(
        bar_chart(
            "time of a head of many words in its name",
            "ms",
            [
                ("a case whose name has to be folded because it is long, as they are", bars)
                for bars in (
                    [Bar("ours", 3.2, 1, (3.0, 3.5)), Bar("a provider " * 8, 1825.0, 0)],
                    [Bar("zero", 0.0, 0), Bar("", 12.0, 1)],
                )
            ],
            (1000.0, "the floor"),
        )
    ),
    "signed bars": ElementTree.fromstring(
        bar_chart(
            "offset",
            "nats",
            [("", [Bar("alice", 0.8, 0), Bar("bob", -0.4, 1)])],
            (0.0, "none"),
        )
    ),
}


@pytest.mark.parametrize("name", CHARTS)
def test_no_label_lies_on_another_or_out_of_the_picture(name):
    assert overlaps(CHARTS[name]) == []


@pytest.mark.parametrize("name", set(CHARTS) - {"bars", "signed bars"})
def test_both_axes_have_a_unit_and_ticks(name):
    shown = texts(CHARTS[name], "soft")
    assert "nats" in shown and "optimizer step" in shown
    assert len(texts(CHARTS[name], "tick")) >= 3


def test_lines_on_each_other_all_show():
    """Each is wider than those above it, and dashed as no other is."""
    same = [Series(f"run {i}", [(0.0, 1.0), (50.0, 2.0), (99.0, 0.5)], i) for i in range(5)]
    groups = [g for g in chart(*same) if g.tag == f"{SVG}g" and g.find(f"{SVG}title") is not None]
    lines = [g.find(f"{SVG}path[@stroke-linejoin]") for g in groups]
    widths = [float(line.get("stroke-width")) for line in lines]
    assert len(lines) == 5 and all(a > b + 1 for a, b in pairwise(widths))
    assert len({line.get("stroke-dasharray") for line in lines}) == 5
    colours = {g.get("class") for g in groups}
    assert len(colours) == 5
    apart = [Series(str(i), [(0.0, i), (9.0, i)], i) for i in range(3)]
    assert line_chart(Chart("t", "x", "y", apart)).count('stroke-width="1.8"') == 3


def test_points_on_each_other_all_show():
    """A run of one step: its points are one on the other."""
    found = chart(*(Series(str(i), [(1.0, 0.5)], 0) for i in range(3)))
    groups = [g for g in found if g.find(f"{SVG}title") is not None]
    radii = [float(g.find(f"{SVG}circle").get("r")) for g in groups]
    assert radii == sorted(radii, reverse=True) and len(set(radii)) == 3


def test_thinning_keeps_every_extreme():
    rnd = random.Random(0)
    points = [(float(i), rnd.gauss(0, 1)) for i in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    lines, bands = thinned([points])
    values = [y for _, y in points]
    assert max(most for _, _, most in bands[0]) == 50.0 == max(values)
    assert min(least for _, least, _ in bands[0]) == min(values)
    assert len(lines[0]) == len(bands[0]) <= 300
    assert all(a <= y <= b for (_, y), (_, a, b) in zip(lines[0], bands[0], strict=True))
    drawn = line_chart(Chart("t", "x", "y", [Series("a", points, 0)]))
    assert len(drawn) < 20_000 and "band: its least to most" in drawn


def test_what_is_not_finite_breaks_the_line_and_is_marked():
    drawn = line_chart(
        Chart("t", "x", "y", [Series("a", [(i, 1.0 if i != 5 else math.nan) for i in range(10)])])
    )
    assert drawn.count('class="broken"') == 1 and drawn.count('stroke-linejoin="round"') == 2
    assert "1 value not finite" in drawn and "nan" not in drawn.lower()
    none = line_chart(Chart("t", "x", "y", [Series("a", [(1.0, math.nan)])]))
    assert "1 value not finite" in none
    assert line_chart(Chart("t", "x", "y", [Series("a", [])])) == ""


def test_outliers_do_not_flatten_the_rest():
    points = [(float(i), 3.0 + math.sin(i)) for i in range(100)]
    points[2] = (2.0, 3e4)
    drawn = line_chart(Chart("t", "x", "y", [Series("a", points, 0)]))
    assert 'class="outside"' in drawn and "outside the frame: 1, farthest 30,000" in drawn
    assert "10,000" not in drawn


def test_labels_keep_their_order_apart():
    rnd = random.Random(1)
    for n in range(1, 13):
        wanted = sorted(rnd.uniform(0, 150) for _ in range(n))
        found = spread_out(wanted, 11.5, 3, 149)
        assert all(b - a >= 11.49 for a, b in pairwise(found))
        assert found[0] >= 2.9 and found[-1] <= 149.1
    assert spread_out([10.0, 80.0], 11.5, 3, 149) == [10.0, 80.0]


def test_numbers():
    given = (0.693147, -0.5, 12345.678, 3, 1e-7, 2.5e9, float("nan"), float("inf"), None, True, 0.0)
    assert [number(x) for x in given] == (
        ["0.6931", "−0.5", "12,346", "3", "1e−7", "2.5e9", "NaN", "∞", "–", "–", "0"]
    )
    assert [seconds(x) for x in (0.0123, 5.5, 200, 9000, None)] == (
        ["12.3 ms", "5.5 s", "3 min", "2 h 30 min", "–"]
    )
    assert size(2**31) == "2 GiB" and size(5 * 2**20) == "5 MiB"
    assert tick_texts(steps_between(0, 1, 6)) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert steps_between(0.9, 2.1, 6, whole=True) == [1.0, 2.0]
    assert all(t == int(t) for t in steps_between(1, 7, 5, whole=True))


def test_a_chart_is_a_file_of_its_own(tmp_path: Path):
    file = tmp_path / "chart.svg"
    file.write_text(file_of(line_chart(Chart("<t>", "x", "y", [ramp("a & b", 0, 1.0)]))))
    root = ElementTree.parse(file).getroot()
    assert root.tag == f"{SVG}svg" and root.find(f"{SVG}style") is not None
    assert texts(root)[0] == "<t>"
