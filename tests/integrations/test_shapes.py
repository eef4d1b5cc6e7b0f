"""The shapes of other packages' trainers, told without importing them."""

from __future__ import annotations

import re

import pytest

from dpo_kernels import doctor
from dpo_kernels.integrations import shapes
from dpo_kernels.integrations.frameworks import UnsupportedShape, UnsupportedVersion

SOURCE = """
class Other:
    pass

class DPOTrainer(Base):
    def __init__(self, model, ref_model=None, args=None): ...
    def {forward}: ...
    def compute_ref_log_probs(self, inputs): ...
    def _precompute_ref_logps(self, dataset, name, batch_size): ...
    def _set_signature_columns_if_needed(self): ...
    def log(self, logs, start_time=None): ...
"""


def methods(tmp_path, forward):
    file = tmp_path / "dpo_trainer.py"
    file.write_text(SOURCE.format(forward=forward))
    return shapes.methods_in(file, "DPOTrainer")


FORWARD = "_compute_loss(self, model, inputs, return_outputs)"


@pytest.mark.parametrize("forward", [FORWARD, "_compute_loss(self, **given)"])
def test_a_shape_is_read_from_source(forward, tmp_path):
    found = methods(tmp_path, forward)
    assert shapes.shape_of(shapes.TRL, found, "1.17.0") is shapes.COLLATED
    assert shapes.methods_in(tmp_path / "dpo_trainer.py", "Absent") is None


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        (
            "_compute_loss(self, model, batch)",
            r"_compute_loss\(model, batch\) takes no inputs, ret",
        ),
        ("compute(self, model, inputs)", "0.29 and 1.x: no _compute_loss"),
    ],
)
def test_what_is_missing_is_said_by_name(forward, told, tmp_path):
    with pytest.raises(UnsupportedShape, match=told) as raised:
        shapes.shape_of(shapes.TRL, methods(tmp_path, forward), "1.99.0")
    assert isinstance(raised.value, UnsupportedVersion)
    assert "trl 1.99.0" in str(raised.value) and "no concatenated_forward" in str(raised.value)


def test_a_class_and_its_source_have_one_shape(tmp_path):
    found = methods(tmp_path, FORWARD)
    scope: dict = {"Base": object}
    exec(SOURCE.format(forward=FORWARD), scope)
    of_class = shapes.methods_of(scope["DPOTrainer"])
    assert found.items() <= of_class.items()
    assert shapes.shape_of(shapes.TRL, of_class, None) is shapes.COLLATED
    assert "__init__" not in shapes.methods_of(type("Empty", (), {}))


@pytest.mark.parametrize(
    ("module", "kind"), [("torch.trainer.dpo_trainer", "DPOTrainer"), ("torch.nn", "DPOTrainer")]
)
def test_a_release_without_the_class_is_told(module, kind):
    """trl 1.99: moved elsewhere, or renamed."""
    moved = shapes.Trainer("torch", module, kind, "patch_trl()", ())
    with pytest.raises(UnsupportedShape, match=rf"torch \S+ has no {module}.DPOTrainer"):
        shapes.class_of(moved)


def test_a_package_that_is_not_there_is_told():
    absent = shapes.Trainer("no-such", "no_such.trainer", "DPOTrainer", "patch_trl()", ())
    with pytest.raises(ImportError, match="pip install no-such"):
        shapes.class_of(absent)


@pytest.mark.parametrize(
    ("forward", "version", "told"),
    [
        (
            FORWARD,
            "1.99.0",
            r"patch_trl\(\) exchanges its DPOTrainer \(shape of trl 0\.29",
        ),
        ("compute(self)", "1.99.0", "no shape that is known here .* Nothing was patched"),
        (FORWARD, None, "absent"),
    ],
)
def test_what_the_doctor_says_of_a_trainer(forward, version, told, tmp_path, monkeypatch):
    methods(tmp_path, forward)
    monkeypatch.setattr(shapes, "version_of", lambda package: version)
    monkeypatch.setattr(shapes, "source_of", lambda module: tmp_path / "dpo_trainer.py")
    assert re.search(told, shapes.what_a_patch_does(shapes.TRL))


def test_the_doctor_knows_the_trainers_and_what_is_below_them():
    found = doctor._trainers()
    assert {"trl", "llamafactory", "ms-swift", "axolotl"} == set(found["trainers"])
    assert {"peft", "accelerate"} <= set(found["packages"])
    lines = doctor._trainer_lines(found)
    assert len(lines) == 1 + len(found["trainers"]) and "peft" in lines[0]
