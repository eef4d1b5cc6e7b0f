"""`dpo-kernels doctor` where something is wrong: what it is and what to do, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import dpo_kernels
from dpo_kernels import doctor, requirements

PACKAGE = Path(dpo_kernels.__file__).parent
# An editable installation finds missing submodules in the sources.
ISOLATE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
"""
RUN = "from dpo_kernels.cli import main; sys.exit(main(sys.argv[1:]))"


def package_without_module(folder: Path) -> Path:
    """A copy of the package (links) without its compiled module."""
    copy = folder / "dpo_kernels"
    copy.mkdir(parents=True)
    for entry in PACKAGE.iterdir():
        if entry.suffix != ".so":
            (copy / entry.name).symlink_to(entry)
    return copy


def fake(folder: Path, name: str, version: str, code: str | None = None) -> None:
    """Metadata that shadow the installed package's, and code that shadows its own."""
    if code is not None:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def run(
    *arguments: str, paths: tuple[Path, ...] = (), options: tuple[str, ...] = (), code: str = RUN
) -> tuple[int, str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, PACKAGE.parent)))
    done = subprocess.run(
        [sys.executable, *options, "-c", ISOLATE + code, *arguments],
        env=env,
        cwd=os.sep,
        capture_output=True,
        text=True,  # the working folder comes first
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_broken_torch(tmp_path: Path) -> None:
    fake(tmp_path, "torch", "2.9.9", "raise OSError('libcublas.so.12: cannot open')")
    code, text = run("doctor", paths=(tmp_path,))
    assert code == 1 and "torch 2.9.9" in text and "does not load (OSError: libcublas" in text
    assert str(tmp_path) in text and "reinstall it" in text and "packages: " in text
    code, text = run("doctor", "--json", paths=(tmp_path,))
    report = json.loads(text)
    assert code == 1 and not report["self_test"]["passed"] and len(report["problems"]) == 1
    code, text = run("train", paths=(tmp_path,))
    assert code == 2 and text.startswith("dpo-kernels: error: torch 2.9.9")
    code, text = run(
        paths=(tmp_path,),
        code="""
import dpo_kernels as dk
assert dk.__version__
try:
    dk.fused_dpo_loss
except ImportError as error:
    assert isinstance(error.__cause__.__cause__, OSError)
    print(error)
""",
    )
    assert code == 0 and "dpo_kernels.fused_dpo_loss needs torch" in text


def test_no_torch(tmp_path: Path) -> None:
    package_without_module(tmp_path)
    code, text = run("doctor", options=("-S",), paths=(tmp_path,))  # -S: no site-packages
    assert code == 1 and "the package torch is not installed: pip install 'torch>=2.6'" in text


def test_old_torch(tmp_path: Path) -> None:
    fake(tmp_path, "torch", "2.3.1", "raise AssertionError('an old torch is not imported')")
    code, text = run("doctor", paths=(tmp_path,))
    assert code == 1 and "torch 2.3.1 is too old: pip install -U 'torch>=2.6'" in text


def test_old_triton(tmp_path: Path) -> None:
    """The CPU backend still works: exit code 0, and what to do for a GPU."""
    fake(tmp_path, "triton", "3.1.0")
    code, text = run("doctor", "--json", paths=(tmp_path,))
    report = json.loads(text)
    assert "triton 3.1.0 is too old: pip install -U 'triton>=3.2'" in report["problems"]
    assert not report["backends"]["triton"]["usable"]
    assert code == 0 and report["self_test"]["passed"]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (None, "the compiled module dpo_kernels._C is missing"),
        ("_C.cpython-39-x86_64-linux-gnu.so", "the compiled module is for another Python"),
        (f"_C{EXTENSION_SUFFIXES[0]}", "does not load: "),
    ],
)
def test_no_usable_module(module: str | None, says: str, tmp_path: Path) -> None:
    copy = package_without_module(tmp_path)
    if module:
        (copy / module).write_text("not a library")
    code, text = run("doctor", paths=(tmp_path,))
    assert code == 1 and says in text and "compiled module: none" in text
    assert "self-test of cpu (the default here): FAILED" in text and "to mend: the comp" in text


def test_two_openmp_pools(tmp_path: Path) -> None:
    report = doctor.examine()
    if not report["openmp"]["runtimes"]:
        pytest.skip("/proc/self/maps names no OpenMP runtime here")
    assert len(report["openmp"]["runtimes"]) == 1 and not report["problems"], report["problems"]
    assert report["openmp"]["kernel_threads"] == report["openmp"]["torch_threads"]
    second = tmp_path / "libgomp-0123abcd.so.1"
    second.write_bytes(Path(report["openmp"]["runtimes"][0]).read_bytes())
    code, text = run("doctor", code=f"import torch, ctypes; ctypes.CDLL({str(second)!r});" + RUN)
    assert code == 0 and "2 OpenMP runtimes are in this process" in text and str(second) in text


def test_every_section_reads_well() -> None:
    report = doctor.examine()
    text = doctor.render(report)
    for words in (
        "packages: torch",
        "devices: cpu",
        "GPU software",
        "compiled module: ",
        "OpenMP:",
        "backends:",
        "self-test of",
    ):
        assert words in text
    assert {section.key for section in doctor.SECTIONS} <= set(report)
    json.dumps(report)


def test_a_gpu_that_the_binary_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_kernels.backends import cuda

    monkeypatch.setattr(cuda, "architectures", lambda: ["80", "86", "90"])
    assert cuda.code_for(8, 0) == "machine code of sm_80"
    assert cuda.code_for(8, 9) == "machine code of sm_86"
    assert cuda.code_for(12, 0).startswith("PTX of sm_90")
    assert cuda.code_for(7, 5) == ""
    report = doctor.examine()
    report["binary"] = {"file": "x", "architectures": ["80"], "devices": {"cuda:0": ""}}
    assert any("no code for cuda:0" in problem for problem in doctor._problems(report))


def test_versions_are_found_without_importing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "nightly_thing").mkdir()
    (tmp_path / "nightly_thing" / "__init__.py").write_text("__version__ = '3.4.0+git'\nraise E")
    monkeypatch.syspath_prepend(tmp_path)
    assert requirements.version_of("nightly_thing") == "3.4.0+git"
    assert requirements.version_of("no_such_package_here") is None
