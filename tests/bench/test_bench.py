"""The benchmarks' own room: cases, checks against float64, results files, tables and the page."""

import json
import re

import pytest
import torch

from dpo_kernels.bench import cases, measure, peak_memory, providers, report, results, run
from dpo_kernels.bench.cases import MODELS, Case, Model
from dpo_kernels.bench.measure import Measurement
from dpo_kernels.bench.providers import Absent, Provider
from dpo_kernels.cli import main

SUITES = (
    "logits forward",
    "logits fwd+bwd",
    "small batch",
    "linear trained",
    "linear frozen",
    "linear reference",
    "pair loss",
    "training step",
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", Model(64, 211))
    monkeypatch.setitem(MODELS, "tiny softcap", Model(64, 211, softcap=5.0))


def case(suite, model="tiny", dtype="fp32", **sizes):
    return Case(suite, model, dtype, **{"tokens": 48, "fraction": 0.6, **sizes})


@pytest.mark.parametrize("suite", SUITES)
def test_all_providers_are_right_and_timed(suite, monkeypatch):
    monkeypatch.setattr(providers, "compiled", lambda function: function)  # the compiler's minute
    found = {m.provider: m for m in measure.measure(case(suite), "cpu", rounds=2)}
    mine = [m for m in found.values() if m.ours]
    assert mine and all(m.note == "" and len(m.seconds) == 2 for m in mine)
    assert "torch eager" in found
    for m in found.values():
        assert m.note.startswith("absent: ") or (m.note == "" and m.error < 1e-3), (m.provider, m)
        if m.seconds and suite.startswith(("logits", "linear", "small")):
            assert m.floor > 0
        if m.gradient_error is not None:
            assert m.gradient_error < 1e-4


def test_softcap_reaches_every_provider(monkeypatch):
    monkeypatch.setattr(providers, "compiled", lambda function: function)
    for suite in ("logits fwd+bwd", "linear trained"):
        for m in measure.measure(case(suite, "tiny softcap"), "cpu", rounds=1):
            assert m.note.startswith("absent: ") or m.note == "", (m.provider, m.note)


def test_a_wrong_provider_is_reported_with_its_error(monkeypatch):
    def table(case, device):
        yield "wrong", lambda: Provider("wrong", lambda x: x.logits.float().mean() * 100)
        yield "broken", lambda: Provider("broken", lambda x: 1 / 0)

    monkeypatch.setattr(providers, "providers", table)
    wrong, broken = measure.measure(case("logits fwd+bwd"), "cpu", rounds=1)
    assert wrong.note.startswith("wrong: error ") and not wrong.seconds
    assert broken.note == "failed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_a_wrong_gradient_is_no_rounding(factor, monkeypatch):
    c = case("logits fwd+bwd", dtype="bf16", tokens=256)
    eager = dict(providers.providers(c, "cpu"))["torch eager"]()

    def call(x):
        loss = eager.call(x)
        return factor * loss + (1 - factor) * loss.detach()

    monkeypatch.setattr(providers, "providers", lambda *_: [("bent", lambda: Provider("x", call))])
    (bent,) = measure.measure(c, "cpu", rounds=1)
    assert bent.note.startswith("wrong: ") and bent.gradient_error > 0.9


def test_an_overwriting_provider_meets_fresh_logits():
    x = measure.make_inputs(case("logits fwd+bwd"), "cpu")
    mine = dict(providers.providers(x.case, "cpu"))["dpo-kernels cpu in place"]()
    kept = x.logits.detach().clone()
    call, before = measure._timed_call(mine, x)
    call()
    assert not torch.equal(x.logits, kept)  # the gradient lies there
    before()
    assert torch.equal(x.logits, kept)


def test_an_absent_peer_says_how_to_get_it():
    with pytest.raises(Absent, match="pip install 'no-such-peer'"):
        providers._import("no_such_peer", "loss", "no-such-peer")


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_case_names_are_unique_and_stable(device):
    for chosen in (cases.quick(device), cases.full(device)):
        names = [c.name for c in chosen]
        assert len(set(names)) == len(names)
        assert {c.suite for c in chosen} <= set(cases.SUITES)
    first = "linear trained SmolLM2-135M fp32 256 tokens in 2 pairs, 50% scored"
    assert device == "cuda" or first in {c.name for c in cases.quick("cpu")}
    for series, grown in cases.scaling(device).items():
        sizes = [run.grown(series, c) for c in grown]
        assert sizes == sorted(set(sizes)), series


def test_scored_rows_are_those_of_the_case():
    c = case("logits forward")
    assert c.length == 12 and c.scored == 4 * 7
    inputs = measure.make_inputs(c, "cpu")
    assert int(inputs.scored()[1].sum()) == c.scored


def test_peak_memory_is_that_of_the_call():
    c = case("logits fwd+bwd", model="GPT-2", tokens=256, fraction=1.0)
    size = 260 * 50257 * 4
    inplace = peak_memory.peak_bytes(c, "dpo-kernels cpu in place", "cpu")
    plain = peak_memory.peak_bytes(c, "dpo-kernels cpu", "cpu")
    assert inplace < 0.3 * size and 0.9 * size < plain < 1.4 * size, (inplace, plain, size)
    assert "no_such" in str(peak_memory.peak_bytes(c, "no_such", "cpu"))


SVG = "http://www.w3.org/2000/svg"  # a name, not an address


def rows():
    ours = Measurement(case("linear trained"), "dpo-kernels cpu", True, [0.1, 0.3, 0.2], 0.1, 1e-7)
    peer = Measurement(case("linear trained"), "peer", False, [0.5, 0.4, 0.6], 0.1, 2e-3)
    gone = Measurement(case("linear trained"), "gone", note="absent: pip install 'gone'")
    memory = Measurement(case("linear frozen"), "dpo-kernels cpu", True, peak_bytes=3 << 20)
    grown = [
        results.as_row(m) | {"series": "linear trained by tokens", "x": x}
        for m in (ours, memory)
        for x in (1, 2)
    ]
    return [*map(results.as_row, (ours, peer, gone, memory)), *grown]


def test_results_tables_and_page(tmp_path, capsys):
    file = tmp_path / "run.json"
    meta = results.describe(commit="abc")
    results.write(file, meta, rows())
    assert results.read(file)["rows"] == rows()
    assert json.loads(file.read_text())["kernels"]
    text = results.text(meta, rows())
    assert "200 ms (100 to 300)" in text and "2.50 x ours" in text
    assert "50 %" in text and "absent: pip install 'gone'" in text and "3 MiB" in text
    (tmp_path / "other.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg ") == 5  # time, memory, floor, two series
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    assert cells[cells.index("peer") :][:5] == ["peer", "500 ms", "400-600", "2.50", "20 %"]
    assert len(list((tmp_path / "report").glob("run-*.svg"))) == 5


def test_page_on_a_phone_without_empty_columns(tmp_path):
    """Numbers do not wrap, wide tables scroll by themselves, charts are vectors."""
    pair = Measurement(case("pair loss", "-", pairs=256, tokens=0), "dpo-kernels cpu", True, [0.1])
    results.write(tmp_path / "run.json", results.describe(commit="abc"), [results.as_row(pair)])
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert 'name="viewport"' in page and "white-space: nowrap" in page
    assert '<div class="wide"><table>' in page and "://" not in page.replace(SVG, "")
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", page)
    assert "median" in heads and "peak memory" not in heads and "note" not in heads
    assert "<h4>pair loss fp32 256 pairs</h4>" in page and "0 tokens" not in page
    assert page.count("<svg ") == 1
    assert "pair loss fp32 256 pairs" in (tmp_path / "report" / "run-0.svg").read_text()
    assert results.shown(case("logits forward").name) == case("logits forward").name


def test_memory_is_compared_with_what_leaves_the_logits(tmp_path):
    c = case("logits fwd+bwd")
    found = {"dpo-kernels cpu": 2 << 20, "dpo-kernels cpu in place": 0, "torch eager": 3 << 20}
    weighed = [
        results.as_row(Measurement(c, name, "dpo" in name, peak_bytes=size))
        for name, size in found.items()
    ]
    results.write(tmp_path / "run.json", results.describe(commit="abc"), weighed)
    assert "| 2 MiB | - | 1.5x |" in report.readme_tables(tmp_path)


def test_who_is_faster_in_bf16_stands_with_both_errors(tmp_path):
    """Recorded by the command that the page names, which measures the three passes of the head."""
    assert report.BF16_HEAD_COMMAND in report.bf16_head(tmp_path)
    select = report.BF16_HEAD_COMMAND.split('"')[1]
    chosen = [c for c in cases.full("cpu") if select in c.name]
    assert [c.suite for c in chosen] == ["linear trained", "linear frozen", "linear reference"]
    assert {c.dtype for c in chosen} == {"bf16"} and {c.scored for c in chosen} == {512}
    found = (
        ("dpo-kernels cpu", True, 0.58, 4e-5, 2e-6),
        ("torch eager", False, 0.43, 2e-2, 3e-3),
        ("slower", False, 0.9, 1e-7, 1e-7),
    )
    timed = [
        results.as_row(Measurement(chosen[0], name, ours, [seconds], 0.1, error, gradient))
        for name, ours, seconds, error, gradient in found
    ]
    gone = results.as_row(Measurement(chosen[0], "gone", note="absent: pip install 'gone'"))
    results.write(tmp_path / report.BF16_HEAD, results.describe(commit="abc"), [*timed, gone])
    text = report.bf16_head(tmp_path)
    assert "| dpo-kernels cpu | 580 ms | 4e-05 | 2e-06 |" in text
    assert "| torch eager | 430 ms | 2e-02 | 3e-03 |" in text
    assert "slower" not in text and "gone" not in text


def test_liger_has_a_frozen_head(monkeypatch):
    pytest.importorskip("liger_kernel")
    for suite, there in (("linear frozen", True), ("linear reference", False)):
        found = {m.provider: m for m in measure.measure(case(suite), "cpu", 1, "Liger DPO")}
        assert set(found) == {"Liger DPO", "Liger DPO without reference"}
        for m in found.values():
            assert (
                (m.note == "" and m.error < 1e-3 and m.gradient_error < 1e-4)
                if there
                else (m.note == "absent: has no reference pass of its own")
            )


def test_memory_set_has_series(monkeypatch):
    monkeypatch.setattr(peak_memory, "peak_bytes", lambda case, name, device: case.tokens)
    rows = list(run.run_set("memory", "by tokens", "dpo-kernels cpu", report=lambda line: None))
    assert {r["series"] for r in rows} == {"logits fwd+bwd by tokens", "linear trained by tokens"}
    assert all(r["x"] == r["peak bytes"] for r in rows)


def test_bad_paths_are_errors_of_one_line(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"format": "else"}')
    other = tmp_path / "other.json"
    for path, text in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "holds no results file"),
        (other, "expected 'dpo-kernels benchmark 1'"),
    ):
        assert main(["report", str(path)]) == 2
        assert text in capsys.readouterr().err
    assert main(["bench", "--case", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err


def test_bench_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cases, "quick", lambda device: [case("pair loss", "-", pairs=4)])
    file = tmp_path / "out.json"
    options = ["--case", "pair", "--provider", "dpo", "--json", str(file), "--commit", "abc"]
    assert main(["bench", *options]) == 0
    assert "dpo-kernels" in capsys.readouterr().out
    (row,) = results.read(file)["rows"]
    assert row["provider"] == "dpo-kernels" and row["seconds"] > 0
