"""README: its code runs, its losses table is the table, its files exist."""

import re
from pathlib import Path

import pytest

from dpo_kernels.bench.report import bf16_head, readme_tables
from dpo_kernels.losses import table_markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    """Blocks of Python; one marked `continues` goes on from the one before."""
    programs: list[str] = []
    for continues, code in re.findall(
        r"(<!-- continues -->\n)?```python\n(.*?)```", README, re.DOTALL
    ):
        programs.append(programs.pop() + code if continues else code)
    return programs


@pytest.mark.parametrize("code", python_blocks())
def test_code_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_is_code():
    assert sum(code.count("import dpo_kernels") for code in python_blocks()) >= 1


def test_losses_table_is_generated():
    block = README.split("dpo_kernels/losses.py -->\n")[1].split("\n<!-- /losses -->")[0]
    assert block == table_markdown(), "regenerate it from dpo_kernels.losses.table_markdown()"


def test_benchmark_tables_are_generated():
    block = README.split("benchmarks/results -->\n")[1].split("\n<!-- /benchmarks -->")[0]
    assert block == readme_tables(ROOT / "benchmarks/results"), "run tools/readme_tables.py"


def test_where_peers_win_in_bf16_is_generated():
    page = (ROOT / "benchmarks/README.md").read_text()
    block = page.split("benchmarks/results -->\n")[1].split("\n<!-- /bf16 -->")[0]
    assert block == bf16_head(ROOT / "benchmarks/results"), "run tools/readme_tables.py"


def test_the_file_tree_exists():
    tree = README.split("## Files\n\n```\n")[1].split("```")[0]
    folder = ROOT
    for line in tree.splitlines():
        name = line.split("   ")[0].strip()
        if not line.startswith(" "):
            folder = ROOT / line.split()[0]
            assert folder.is_dir(), folder
            continue
        for part in name.split(","):
            assert (folder / part.strip()).exists(), f"{folder.name}/{part.strip()}"


def test_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
