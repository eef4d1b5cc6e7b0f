"""README, CONTRIBUTING and docs/: their code runs, generated parts are current, links and paths
exist."""

import re
import sys
import textwrap
from pathlib import Path

import pytest

import dpo_kernels as dk
from dpo_kernels import losses

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import readme_tables  # noqa: E402

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/results/README.md",
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md"))),
]
RUN_ELSEWHERE = {  # tests/integrations/test_recipes.py
    f"docs/{path.name}" for path in (ROOT / "docs").glob("integrations*.md")
}


def python_blocks() -> list:
    """Blocks of Python; one marked `continues` goes on from the one before."""
    programs = []
    for page in PAGES:
        if page in RUN_ELSEWHERE:
            continue
        found: list[str] = []
        for continues, code in re.findall(
            r"(<!-- continues -->\n)?```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL
        ):
            found.append(found.pop() + code if continues else code)
        programs += [pytest.param(code, id=f"{page}-{i}") for i, code in enumerate(found)]
    return programs


@pytest.mark.parametrize("code", python_blocks())
def test_code_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_is_code():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(code.count("import dpo_kernels") for code in blocks) >= 1
    assert {p.id.split("-")[0] for p in python_blocks()} >= {"README.md", "docs/losses.md"}


@pytest.mark.parametrize(("page", "name"), readme_tables.PARTS)
def test_generated_parts_are_current(page, name):
    _, inside, _ = readme_tables.split((ROOT / page).read_text(), name)
    assert inside == readme_tables.PARTS[page, name](), "run tools/readme_tables.py"


def test_every_generated_part_is_known():
    """One that the tool does not write would grow old unseen. kernels.md has its own tool."""
    for page in PAGES:
        for name in re.findall(r"^<!-- /(\w+) -->$", (ROOT / page).read_text(), re.MULTILINE):
            assert (page, name) in readme_tables.PARTS or name == "triton", f"{page}: {name}"


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_the_file_tree_exists():
    text = (ROOT / "docs/architecture.md").read_text()
    tree = text.split("## Rooms\n\n```\n")[1].split("```")[0]
    folder = ROOT
    for line in tree.splitlines():
        name = line.split("   ")[0].strip()
        if not line.startswith(" "):
            folder = ROOT / line.split()[0]
            assert folder.is_dir(), folder
            continue
        for part in re.split("   ", line.strip())[0].split(","):
            assert name and (folder / part.strip()).exists(), f"{folder.name}/{part.strip()}"


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    """What stands in backticks and looks like a file of the project is one."""
    text = (ROOT / page).read_text()
    roots = (ROOT, (ROOT / page).parent, ROOT / "dpo_kernels")
    pattern = r"`((?:[\w.-]+/)+[\w.-]*\.(?:py|cpp|h|cu|json|md|txt|toml))(?:[ :][^`]*)?`"
    for path in re.findall(pattern, text):
        if not path.startswith(("build/", "runs/", "dist/", "sboms/")):
            assert any((root / path).exists() for root in roots), path


@pytest.mark.parametrize("text", (README, CONTRIBUTING), ids=("README", "CONTRIBUTING"))
def test_commands_are_targets(text):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for target in ("train", "test"):
        assert re.search(rf"^make {target}\b", README, re.MULTILINE), target


def test_the_loss_that_contributing_adds():
    """Its blocks make a row, and the row is its formula."""
    import torch
    from torch.nn.functional import logsigmoid

    block = {
        name: textwrap.dedent(
            re.search(rf"<!-- example: {name} -->\n```py\n(.*?)```", CONTRIBUTING, re.DOTALL)[1]
        )
        for name in ("terms", "row", "formula")
    }
    names = dict(vars(losses))
    exec("from __future__ import annotations\n" + block["terms"], names)
    row = eval(block["row"], names)
    option = losses.LossOptions()
    object.__setattr__(option, row.options[0], 0.95)  # the field that a contributor would add
    u, v, b = torch.tensor([0.3, -2.0]), torch.tensor([-1.0, 0.5]), 0.3
    own = {row.options[0]: 0.95}
    formula = eval(
        "{" + block["formula"] + "}", {"own": own, "u": u, "v": v, "b": b, "logsigmoid": logsigmoid}
    )
    assert list(formula) == [row.name]
    loss = dk.ops.pair_loss(u.double(), v.double(), row.terms(option), beta=b, backend="torch")
    torch.testing.assert_close(loss, formula[row.name]().double())
