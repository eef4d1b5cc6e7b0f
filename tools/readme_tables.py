"""Write the generated parts of README.md and docs/: losses, committed results, versions tested.

A part stands between `<!-- NAME: generated ... -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compat  # noqa: E402
import gpu_tables  # noqa: E402

from dpo_kernels.bench.report import bf16_head, readme_tables  # noqa: E402
from dpo_kernels.commands.options_of import options_markdown  # noqa: E402
from dpo_kernels.loss_options import DEFAULTS  # noqa: E402
from dpo_kernels.losses import ALIASES, TABLE  # noqa: E402
from dpo_kernels.train.run_options import GROUPS, SCORE_GROUPS  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
# (page, name) -> what stands there
PARTS: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "state"): lambda: gpu_tables.state(RESULTS),
    ("README.md", "results"): lambda: gpu_tables.headline(RESULTS),
    ("README.md", "verify"): lambda: conformance_line(),
    ("docs/verify.md", "verify"): lambda: conformance(),
    ("docs/losses.md", "losses"): lambda: losses_table(),
    ("docs/options.md", "train"): lambda: options_markdown(GROUPS),
    ("docs/options.md", "score"): lambda: options_markdown(SCORE_GROUPS[-1:]),
    ("docs/benchmarks.md", "gpu"): lambda: gpu_tables.page(RESULTS),
    ("docs/benchmarks.md", "cpu"): lambda: readme_tables(RESULTS),
    ("docs/kernels.md", "budgets"): lambda: budgets(),
    ("docs/kernels.md", "speed"): lambda: gpu_tables.speed(RESULTS, ROOT),
    ("docs/clusters.md", "compatibility"): compat.table,
    ("benchmarks/README.md", "bf16"): lambda: bf16_head(RESULTS),
}


def losses_table() -> str:
    names = {v: [k for k, t in ALIASES.items() if t == v] for v in TABLE}
    lines = ["| `loss_type` | loss | own options (default) | paper |", "|---|---|---|---|"]
    for row in TABLE.values():
        alias = "".join(f", `{a}`" for a in names[row.name])
        own = ", ".join(f"`{n}={DEFAULTS[n]}`" for n in row.options) or "-"
        if row.requires:
            own = ", ".join(f"`{n}` `[B]`, required" for n in row.requires)
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})"
        lines.append(f"| `{row.name}`{alias} | {row.formula} | {own} | {paper} |")
    return "\n".join(lines)


def _verified() -> dict[str, dict[str, list[str]]]:
    return json.loads((RESULTS / "verify.json").read_text())["checks"]


def conformance_line() -> str:
    """For the README: how many checks each trainer passed, and which it failed."""
    parts = []
    for name, mine in _verified().items():
        failed = [check for check, (status, _) in mine.items() if status == "fail"]
        passed = sum(status == "pass" for status, _ in mine.values())
        said = f"{passed} pass" + (f", fails {', '.join(failed)}" if failed else "")
        parts.append(f"`{name}` {said}")
    return f"- [`dpo-kernels verify`](docs/verify.md): {'; '.join(parts)}."


def conformance() -> str:
    """The whole table, with the versions."""
    found = json.loads((RESULTS / "verify.json").read_text())
    names = list(found["checks"])
    lines = [f"| check | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for check in found["checks"][names[0]]:
        cells = [found["checks"][name][check][0] for name in names]
        lines.append(f"| {check} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {found['versions'][name]}" for name in names), ""]
    for name in names:
        for check, (status, detail) in found["checks"][name].items():
            if status != "pass":
                lines.append(f"- {status}: {name}, {check}: {detail}")
    return "\n".join(lines)


def budgets() -> str:
    """Registers a thread that each family of kernels may take, by backend."""
    tests = ROOT / "tests/proof"
    cuda = json.loads((tests / "cuda_budget.json").read_text())["registers"]
    found = json.loads((tests / "triton_budget.json").read_text())
    triton = {name: row[0] for name, row in found.items() if name != "what"}
    cuda = {name.replace(" ", "_"): registers for name, registers in cuda.items()}
    lines = ["| kernel | CUDA | Triton |", "|---|---|---|"]
    for name in dict.fromkeys([*cuda, *triton]):
        lines.append(f"| {name} | {cuda.get(name, '-')} | {triton.get(name, '-')} |")
    return "\n".join(lines)


def main() -> None:
    for (page, name), text in PARTS.items():
        path = ROOT / page
        before, _, after = split(path.read_text(), name)
        path.write_text(before + text() + after)


def split(page: str, name: str) -> tuple[str, str, str]:
    """A page's text before, inside and after its part called `name`."""
    found = re.search(
        rf"(<!-- {name}: generated [^\n]*-->\n)(.*?)(\n?<!-- /{name} -->)", page, re.S
    )
    if found is None:
        raise ValueError(f"the page has no part {name!r}")
    end = f"\n{found[3].lstrip()}"
    return page[: found.end(1)], found[2], end + page[found.end() :]


if __name__ == "__main__":
    main()
