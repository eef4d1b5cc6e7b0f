"""What README.md and docs/benchmarks.md say of GPUs, drawn from a results file made up here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_tables  # noqa: E402
import readme_tables  # noqa: E402

CASE = "8192 tokens in 4 pairs, 60% scored"


def row(suite, model, provider, ms, error=1e-5):
    found = {
        "case": f"{suite} {model} bf16 {CASE}",
        "suite": suite,
        "model": model,
        "dtype": "bf16",
        "provider": provider,
        "ours": provider.startswith("dpo-kernels"),
        "note": "",
        "error": error,
    }
    return found if ms is None else found | {"seconds": ms / 1e3, "floor": 0.020}


PEERS = [
    row("linear trained", "Llama-3-8B", "dpo-kernels triton", 24.0),
    row("linear trained", "Llama-3-8B", "dpo-kernels cuda", 25.0),
    row("linear trained", "Llama-3-8B", "torch eager", 57.0, 8e-4),
    row("linear trained", "Llama-3-8B", "TRL chunked log-probs, scored rows", 34.0),
    row("linear trained", "Llama-3-8B", "Liger DPO", 62.0),
    row("linear trained", "Llama-3-8B", "Liger DPO without reference", 50.0),
    row("linear trained", "Llama-3-8B", "cut-cross-entropy", 65.0),
    row("linear frozen", "Llama-3-8B", "dpo-kernels cuda", 21.0),
    row("linear frozen", "Llama-3-8B", "torch eager", 48.0),
    row("linear frozen", "Llama-3-8B", "QuACK linear cross-entropy", None, None),
    row("linear reference", "GPT-2", "dpo-kernels cuda", 4.87, 1e-3),
    row("linear reference", "GPT-2", "cut-cross-entropy", 1.54, 6e-2),
    row("linear reference", "GPT-2", "torch eager", 11.3),
    row("logits fwd+bwd", "GPT-2", "dpo-kernels cuda", 1.6),
    row("logits fwd+bwd", "GPT-2", "dpo-kernels cuda in place", 1.2),
    row("logits fwd+bwd", "GPT-2", "TRL selective_log_softmax", 1.3),
]
RUN = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.11.0+cu130", "cuda": "13.0", "triton": "3.6.0"},
    "commit": "0123456789abcdef",
    "complete": True,
    "rehearsal": False,
    "tests": {"counts": {"passed": 450, "failed": 4, "skipped": 3}},
    "steps": {
        "build": {"outcome": "passed"},
        "initcheck cuda": {"outcome": "passed"},
        "memcheck cuda": {"outcome": "timed out after 60 s"},
        "racecheck triton": {"outcome": "timed out after 59 s"},
    },
    "figures": {
        "kernels": {
            "copy of 8 GB": {"GB/s": 3027.0},
            "Llama-3 4096 x 128256 cuda forward": {"percent of copy": 97.1, "met": True},
            "Llama-3 4096 x 128256 cuda backward in place": {"percent of copy": 94.4, "met": False},
            "Llama-3 4096 x 128256 triton forward": {"percent of copy": 11.0},
            "Llama-3 4096 x 128256 triton KL": {"percent of copy": 62.0},
        },
        "rows": {
            "cuda 1 rows": {"ms": 0.01, "plain torch ms": 0.04, "met": True},
            "cuda 8 rows": {"ms": 0.05, "plain torch ms": 0.04, "met": False},
        },
        "host": {"from logits": {"us": 796.0, "plain torch us": 553.0, "met": False}},
        "head": {
            "bfloat16 bare products 3": {"ms": 33.0, "TFLOP/s": 777.0},
            "bfloat16 trained, default budget": {
                "ms": 40.8,
                "of the products": 1.229,
                "MiB": 8692.6,
                "met": False,
            },
            "bfloat16 reference": {"ms": 14.5, "of the products": 1.34, "met": False},
        },
        "step": {
            "plain torch": {"ms": 176.0, "tokens/s": 46565.0, "peak MiB": 32861.0},
            "linear": {
                "ms": 152.0,
                "tokens/s": 53792.0,
                "peak MiB": 24175.0,
                "of plain torch": 0.86,
            },
        },
        "peers": {f"{r['case']}: {r['provider']}": r for r in PEERS},
    },
}


def save(folder, name="gpu-h100-0123.json", **changes):
    (folder / name).write_text(json.dumps(RUN | changes))


@pytest.fixture
def results(tmp_path):
    for file in (ROOT / "benchmarks/results").glob("cpu-*.json"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_without_a_complete_run_nothing_is_claimed(results):
    save(results, complete=False)
    save(results, "gpu-host.json", rehearsal=True)
    assert "no complete run" in gpu_tables.state(results)
    assert "No complete run" in gpu_tables.page(results)
    assert "H100" not in gpu_tables.headline(results)
    assert "| CPU, SmolLM2-135M fp32, trained |" in gpu_tables.headline(results)


def test_state_says_what_ran_what_failed_and_what_did_not_run(results):
    save(results)
    first, second = gpu_tables.state(results).split("\n")
    assert first == (
        "- GPU: run on one NVIDIA H100 80GB HBM3 by `make gpu-check`, 2026-01-02 "
        "([results](benchmarks/results/gpu-h100-0123.json)): tests: 450 passed, 4 failed, "
        "3 skipped; compute-sanitizer runs: 1 passed, 2 timed out."
    )
    assert second.startswith("- Not run: several GPUs, AMD, ")


def test_of_a_device_the_newest_run_counts(results):
    save(results)
    save(results, "gpu-h100-new.json", date="2026-02-01", tests={"counts": {"passed": 460}})
    save(results, "gpu-b200.json", device="NVIDIA B200", date="2026-01-20")
    state = gpu_tables.state(results)
    assert "tests: 460 passed;" in state and "450 passed, 4 failed" in state  # the B200's
    assert state.count("run on one") == 2
    assert "other than NVIDIA H100 80GB HBM3 and NVIDIA B200" in state


def test_headline(results):
    save(results)
    table = gpu_tables.headline(results)
    # of the default backend, whichever is faster; Liger's faster call
    assert "| H100, Llama-3-8B bf16, trained | 25 | 57 | 34 | 50 | 65 |" in table
    assert "| H100, Llama-3-8B bf16, frozen | 21 | 48 | - | - | - |" in table
    assert "| H100, GPT-2 bf16, reference | 4.87 | 11.3 | - | - | 1.54 |" in table
    assert "H100: 8192 tokens in 4 pairs, 60% scored. Of a copy's bandwidth: " in table
    assert "forward 97 %, backward in place 94 % (Llama-3 4096 x 128256, bf16)" in table
    assert "53792 tokens/s, peak 24175 MiB; plain torch 46565 and 32861." in table


def test_page(results):
    save(results)
    page = gpu_tables.page(results)
    assert "2 of 7 figures meet their target. The default backend is `cuda`." in page
    assert "| Llama-3 4096 x 128256 | 97 % | - | - | - | 62 % | 94 % | - |" in page
    assert f"| linear trained Llama-3-8B bf16 {CASE} | 25 | 80 % | 57 | 34 | 50 | 65 |" in page
    assert "| bfloat16 trained, default budget | 40.8 | 1.23 | 8693 |" in page
    assert "| bfloat16 reference | 14.5 | 1.34 | - |" in page
    assert "| linear | 152 | 53792 | 24175 |" in page
    assert "cut short" not in page


def test_a_run_that_was_cut_short(results):
    """Figures are kept one by one: what is there is drawn, and the rest named."""
    steps = RUN["steps"] | {"figures peers": {"outcome": "timed out after 90 s"}}
    figures = {
        "kernels": {"copy of 8 GB": {"GB/s": 3027.0}},
        "peers": {"a": PEERS[2], "b": PEERS[5]},
    }
    save(results, steps=steps, figures=figures)
    assert "figures cut short: peers" in gpu_tables.state(results)
    assert "H100, Llama" not in gpu_tables.headline(results)
    assert "- In no case of this run." in gpu_tables.page(results)
    save(results, figures={})
    assert gpu_tables.headline(results) and gpu_tables.page(results)


def test_where_peers_win(results):
    assert gpu_tables.peers_win(RUN).split("\n") == [
        f"- linear reference GPT-2 bf16 {CASE}: cut-cross-entropy 1.54 ms (error 6e-02); "
        "ours 4.87 ms (error 1e-03)",
        # by default nothing is overwritten: that we win in place does not count
        f"- logits fwd+bwd GPT-2 bf16 {CASE}: TRL selective_log_softmax 1.3 ms (error 1e-05); "
        "ours 1.6 ms (error 1e-05)",
        "- host time of a tiny batch from logits: plain torch 553 us; ours 796 us",
        "- forward of 8 rows x 128256: plain torch 0.04 ms; ours 0.05 ms",
    ]


def test_the_readme_stays_short_with_a_gpus_results(results):
    """All six cases of a run on an H100; the README has at most 900 words, tables included."""
    models = [(h, m) for h in gpu_tables.HEADS for m in ("Llama-3-8B", "GPT-2")]
    names = ["dpo-kernels cuda", *(names[0] for names in gpu_tables.PEERS.values())]
    rows = {f"{h} {m} {n}": row(h, m, n, 123.0) for h, m in models for n in names}
    save(results, figures=RUN["figures"] | {"peers": rows})
    page = (ROOT / "README.md").read_text()
    for name, text in (
        ("state", gpu_tables.state(results)),
        ("results", gpu_tables.headline(results)),
    ):
        before, _, after = readme_tables.split(page, name)
        page = before + text + after
    assert "H100, GPT-2 bf16, reference" in page
    assert len(page.split()) <= 900
