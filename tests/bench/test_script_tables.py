"""Tables of the scripts that time whole steps beside TRL."""

from __future__ import annotations

import json
from pathlib import Path

from dpo_kernels.bench.script_tables import script_tables

ABOUT = {"device": "a CPU", "threads": 2, "date": "2026-01-02T03:04:05", "load": 0.5}
TIMES = {"seconds": 2.0, "cpu_seconds": 3.0, "tokens": 100, "speed": 1.5, "cpu_speed": 1.6}


def test_each_format_has_its_table(tmp_path: Path) -> None:
    runs = {
        "TRL script": {
            "versions": {"trl": "1.16.0"},
            "results": {
                "TRL": {
                    "seconds_per_step": 12.0,
                    "speedup": 1.0,
                    "cpu_seconds_per_step": 20.0,
                    "peak_mb": 4000,
                    "training_mb": 3000,
                }
            },
        },
        "real pairs": {
            "pairs_a_step": 4,
            "max_length": 1024,
            "model": "SmolLM2",
            "results": {
                "layouts": {"shared": {**TIMES, "seconds": [1.0, 3.0], "loss_apart": 3e-7}}
            },
        },
        "step": {
            "results": {
                "A, prompt 1/2": {
                    "TRL": {**TIMES, "of TRL": 1.0, "CPU of TRL": 1.0, "training_mb": 7}
                },
                "A, longest pair within 2000 MB": {"TRL": 512, "our loop": 2048},
            }
        },
    }
    for name, run in runs.items():
        whole = {**ABOUT, **run, "format": f"dpo-kernels {name} 1"}
        (tmp_path / f"{name}.json").write_text(json.dumps(whole))
    (tmp_path / "other.json").write_text("[]")
    script, real, step = sorted(script_tables(tmp_path), key=lambda text: text[:9] != "One DPO s")
    assert "| TRL | 12.00 | 1.00x | 20.00 | 4000 | 3000 |" in script and "TRL 1.16.0" in script
    assert "| shared | 100 | 2.00 | 1.50x | 3.00 | 1.60x | 3e-07 |" in real
    assert "Steps of 4 real pairs of at most 1024 tokens" in real and "load 0.5" in real
    assert "| A, prompt 1/2 | TRL | 100 | 2.00 | 1.00x | 3.00 | 1.00x | 7 |" in step
    assert step.endswith("A, longest pair within 2000 MB: TRL 512, our loop 2048.")
