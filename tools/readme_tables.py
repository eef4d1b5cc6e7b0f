"""Write the READMEs' generated parts: losses, committed results, versions tested together."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compat  # noqa: E402

from dpo_kernels.bench.report import bf16_head, readme_tables  # noqa: E402
from dpo_kernels.losses import table_markdown  # noqa: E402


def main() -> None:
    results = ROOT / "benchmarks/results"
    write(ROOT / "README.md", "dpo_kernels/losses.py", "losses", table_markdown())
    write(ROOT / "README.md", "benchmarks/results", "benchmarks", readme_tables(results))
    write(ROOT / "README.md", "docs/compatibility.json", "compatibility", compat.table())
    write(ROOT / "benchmarks/README.md", "benchmarks/results", "bf16", bf16_head(results))


def write(page: Path, source: str, name: str, text: str) -> None:
    """`text` between `<!-- ... source -->` and `<!-- /name -->`."""
    start, end = f"{source} -->\n", f"\n<!-- /{name} -->"
    before, _, rest = page.read_text().partition(start)
    assert end in rest, f"{page} has no block {start!r}"
    page.write_text(before + start + text + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
