"""Versions and absent packages: what is said, and that nothing is imported unasked."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from dpo_kernels.integrations import frameworks
from dpo_kernels.models.options import FusedOptions


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1.16.0", (1, 16, 0)),
        ("0.24.0.dev0", (0, 24, 0)),
        ("2.13.0+cpu", (2, 13, 0)),
        ("1.0.0rc1", (1, 0, 0)),
        ("5", (5,)),
    ],
)
def test_numbers_of_a_version(text, wanted):
    assert frameworks.number(text) == wanted


@pytest.mark.parametrize(
    ("found", "known"),
    [
        ("0.17.0", False),
        ("0.18.0", True),
        ("0.24.0", True),
        ("0.25.0", True),
        ("0.29.1", True),
        ("0.30.0", False),
        ("1.0.0", True),
        ("1.16.4", True),
        ("1.99.0", True),
        ("2.0.0", False),
    ],
)
def test_the_range_of_trl(found, known, monkeypatch):
    monkeypatch.setattr(frameworks, "version", lambda package: found)
    if known:
        assert frameworks.check_version("trl") == frameworks.number(found)
        return
    with pytest.raises(frameworks.UnsupportedVersion, match=f"trl {found} .*<0.30 or >=1.0,<2"):
        frameworks.check_version("trl")
    assert frameworks.check_version("trl", allow_untested=True) == frameworks.number(found)


def test_an_absent_package_is_named(monkeypatch):
    with pytest.raises(ImportError, match="pip install no-such-thing"):
        frameworks.require("no_such_thing", "no-such-thing")

    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(frameworks, "version", absent)
    with pytest.raises(ImportError, match="pip install trl"):
        frameworks.check_version("trl")


def test_nothing_is_imported_before_it_is_asked_for():
    code = (
        "import sys, dpo_kernels.integrations, dpo_kernels.integrations.trl as t; t.FusedOptions();"
        "print(sorted({'trl', 'peft', 'lightning', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_are_checked_when_they_are_given():
    with pytest.raises(ValueError, match="no option called dpop_lamda"):
        FusedOptions(loss_options={"dpop_lamda": 2.0})
    with pytest.raises(TypeError, match="fused must be a FusedOptions or a dict"):
        FusedOptions.of(3, FusedOptions())


def test_the_patches_have_one_address():
    """Without any of the frameworks; what is absent is said when a patch is called."""
    import dpo_kernels.integrations as integrations

    for name in ("patch_trl", "patch_llamafactory", "patch_swift", "unpatch_swift"):
        assert callable(getattr(integrations, name))
    assert issubclass(integrations.BypassedError, RuntimeError)
    with pytest.raises(AttributeError, match="no attribute 'patch_nothing'"):
        integrations.patch_nothing  # noqa: B018
