"""A loss is one row of the table: no other module knows a loss by its name."""

import ast
from pathlib import Path

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import losses

ROOT = Path(dk.__file__).parent
NAMES = {*losses.available(), *losses.ELSEWHERE}
HOME = "losses.py"
# Names that are no losses there: a recipe's parts, a command.
OTHERS = {"cli.py", "data/embedded.py"}
# What holds names of losses: a decision by it is one by a name.
HOLDERS = {"LISTWISE", "UNPAIRED", "ELSEWHERE"}


def names_in(node: ast.AST) -> set[str]:
    """Names of losses among the constants of an expression, or what holds them."""
    found = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
    holders = {getattr(n, "attr", getattr(n, "id", None)) for n in ast.walk(node)} & HOLDERS
    return {value for value in found if isinstance(value, str) and value in NAMES} | holders


def decided_by_name(path: Path) -> set[str]:
    """Names that a comparison, a membership test, a match or a subscript decides by."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            found |= names_in(node)
        elif isinstance(node, ast.match_case):
            found |= names_in(node.pattern)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            found |= names_in(node.value)
    return found


def test_no_loss_is_known_by_its_name_elsewhere():
    found = {}
    for path in ROOT.rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if name != HOME and name not in OTHERS and (names := decided_by_name(path)):
            found[name] = names
    assert found == {}


@pytest.mark.parametrize(
    "code",
    (
        'row.name == "sft"',
        '"ipo" in names',
        'x in ("a", "odpo")',
        '{"dpop": f}[name]',
        'loss_type != "kto"',
        "name in losses.UNPAIRED",
    ),
)
def test_the_test_notices(code, tmp_path):
    (tmp_path / "x.py").write_text(code)
    assert decided_by_name(tmp_path / "x.py")


def test_every_option_is_said_to_be_something():
    assert set(losses.OPTIONS) == set(losses.LossOptions.__dataclass_fields__)
    assert all(0 < len(text) < 90 for text in losses.OPTIONS.values())


def test_own_options_are_those_of_the_rows():
    assert {name for row in losses.TABLE.values() for name in row.options} == set(losses.OWN)


def test_what_a_loss_needs_and_keeps_is_in_its_row():
    assert losses.requires("sigmoid") == set()
    assert losses.requires(["sigmoid", "odpo"]) == {"offset"}
    assert losses.takes_reference("sft") and not losses.takes_reference(["simpo", "cpo"])
    assert losses.fresh_state("sigmoid") == {}
    state = losses.fresh_state(["beta_dpo", "sigmoid"])
    assert list(state) == ["beta_dpo_state"]
    values = [torch.tensor([-3.0, -4.0, -1.0]), torch.tensor([-5.0, -4.5, -2.0])]
    dk.preference_loss(*values, loss_type="beta_dpo", **state)
    assert state["beta_dpo_state"].abs().sum() > 0
    module = dk.FusedDPOLoss(loss_type="beta_dpo", reference_free=True)
    assert torch.equal(module.state, torch.zeros(2, dtype=torch.float64))
