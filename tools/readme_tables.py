"""Write the README's generated tables: losses, committed results, versions tested together."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compat  # noqa: E402

from dpo_kernels.bench.report import readme_tables  # noqa: E402
from dpo_kernels.losses import table_markdown  # noqa: E402


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    blocks = (
        ("dpo_kernels/losses.py -->\n", "\n<!-- /losses -->", table_markdown()),
        ("benchmarks/results -->\n", "\n<!-- /benchmarks -->",
         readme_tables(ROOT / "benchmarks/results")),
        ("docs/compatibility.json -->\n", "\n<!-- /compatibility -->", compat.table()),
    )  # fmt: skip
    for start, end, table in blocks:
        before, _, rest = text.partition(start)
        assert end in rest, f"README.md has no block {start!r}"
        text = before + start + table + end + rest.partition(end)[2]
    path.write_text(text)


if __name__ == "__main__":
    main()
