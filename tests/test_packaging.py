"""What is released and how it is built: sdist, source builds, versions, licences, compatibility."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dpo_kernels
from dpo_kernels import requirements

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
sys.path.insert(0, str(ROOT / "tools"))


def test_bounds_are_the_same_everywhere() -> None:
    import compat

    for package, oldest in requirements.OLDEST.items():
        bound = re.search(rf'"{package}>=([\d.]+)', PYPROJECT)[1]
        assert tuple(map(int, bound.split("."))) == oldest, package
        tested = getattr(compat.OLDEST, package)
        assert tuple(map(int, tested.split(".")[:2])) == oldest, f"make compat tests {tested}"


def test_compatibility_is_what_was_tested() -> None:
    import compat

    cells = json.loads(compat.RESULTS.read_text())["cells"]
    assert [c["cell"] for c in cells] == ["oldest", "newest"] and all(c["passed"] for c in cells)
    for result, cell in zip(cells, (compat.OLDEST, compat.NEWEST), strict=True):
        assert result["torch"].split("+")[0] == cell.torch, "run make compat"
        assert (result["triton"], result["transformers"]) == (cell.triton, cell.transformers)
        for counts in result["tests"].values():
            assert counts["passed"] > 0 and not {"failure", "error"} & set(counts)
    block = (ROOT / "docs/clusters.md").read_text().split("docs/compatibility.json -->\n")[1]
    assert block.split("\n<!-- /compatibility -->")[0] == compat.table(), (
        "regenerate it: python tools/readme_tables.py"
    )


def test_what_old_systems_lack_is_written_anew(tmp_path: Path) -> None:
    """Exceptions copied, kept and thrown again through the wheel's own runtime, and counted."""
    if not (compiler := shutil.which("c++")):
        pytest.skip("no C++ compiler")
    import glibc

    program, source = tmp_path / "program", tmp_path / "program.cpp"
    source.write_text("""
#include <cassert>
#include <exception>
#include <new>
#include <vector>
int alive = 0;
struct Thing {
  Thing() { ++alive; }
  Thing(const Thing&) { ++alive; }
  ~Thing() { --alive; }
};
int main(int argc, char**) {
  std::exception_ptr kept;
  try { throw Thing(); } catch (...) { kept = std::current_exception(); }
  { std::vector<std::exception_ptr> copies(5, kept); assert(alive == 1); }
  try { std::rethrow_exception(kept); } catch (const Thing&) { assert(alive == 1); }
  kept = nullptr;
  assert(alive == 0);
  bool refused = false;
  try { std::allocator<Thing>().allocate(~0ul / argc); } catch (const std::bad_alloc&) {
    refused = true;
  }
  assert(refused);
}
""")
    command = [compiler, "-std=c++17", "-O1", source, glibc.RUNTIME, "-o", program]
    subprocess.run(command, check=True)
    subprocess.run([program], check=True)
    mine = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    for name in ("exception_ptr9_M_addref", "exception_ptr10_M_release", "bad_array_new_length"):
        assert re.search(rf" [Tt] _Z\S*{name}", mine), name
    assert not [s for s in glibc.too_new(program) if re.search("exception_ptr|bad_array", s)]


def test_symbols_newer_than_the_wheels_glibc_are_seen(tmp_path: Path) -> None:
    """Those of a newer version, and those of none, which auditwheel does not see."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler")
    import glibc

    source, library = tmp_path / "x.c", tmp_path / "x.so"
    source.write_text("""
double log2(double);
extern int nowhere(void), PyNone(void), GOMP_x(void), memcpy(void);
__asm__(".symver later,later@GLIBC_2.99"); extern int later(void);
int all(void) { return nowhere() + PyNone() + GOMP_x() + later() + memcpy(); }
""")
    versions = tmp_path / "later.map"
    versions.write_text("GLIBC_2.99 { later; };")
    other = tmp_path / "later.c"
    other.write_text("int later(void) { return 0; }")
    script_ = f"-Wl,--version-script={versions}"
    for command in (
        [other, script_, "-o", tmp_path / "liblater.so"],
        [source, f"-L{tmp_path}", "-llater", "-o", library],
    ):
        subprocess.run([compiler, "-w", "-shared", "-fPIC", *command], check=True)
    assert glibc.too_new(library) == ["later@GLIBC_2.99", "nowhere (of no version)"]


def test_built_wheels_fit_old_systems(tmp_path: Path) -> None:
    """The wheels in dist/, and the module under test where it was installed from one."""
    import glibc

    binaries = []
    for wheel in (ROOT / "dist").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if re.search(r"/_C\..*\.so$", n))
            binaries.append(Path(archive.extract(name, tmp_path / wheel.stem)))
        oldest = re.search(r"manylinux_(\d+)_(\d+)_", wheel.name)
        assert oldest and tuple(map(int, oldest.groups())) <= glibc.GLIBC, wheel.name
    if "site-packages" in (installed := Path(dpo_kernels.__file__).with_name("_C")).parts:
        binaries += installed.parent.glob("_C.*.so")
    if not binaries:
        pytest.skip("no wheel here: make wheel")
    for binary in binaries:
        assert glibc.too_new(binary) == [], binary


def test_one_version() -> None:
    assert 'version = { attr = "dpo_kernels.version.__version__" }' in PYPROJECT
    assert not re.search(r'^version = "', PYPROJECT, re.MULTILINE)
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == dpo_kernels.__version__


def annotations(path: Path):
    """(function, annotation) of the operators that a file registers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any(
            "custom_op" in ast.unparse(d) for d in node.decorator_list
        ):
            for argument in node.args.args:
                yield node.name, ast.unparse(argument.annotation)


def test_operators_have_schemas_on_torch_2_6() -> None:
    """Its infer_schema knows `List[int]` of typing and not `list[int]`."""
    found = 0
    for path in (ROOT / "dpo_kernels" / "ops").glob("*.py"):
        for name, annotation in annotations(path):
            assert not annotation.startswith("list["), f"{path.name}: {name}: {annotation}"
            found += annotation.startswith("List[")
    assert found


def test_traced_code_has_no_isinstance_of_a_union() -> None:
    """Dynamo of torch 2.6 does not trace `isinstance(x, int | float)`; a tuple it does."""
    for path in [*(ROOT / "dpo_kernels").glob("*.py"), *(ROOT / "dpo_kernels/ops").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                union = isinstance(node.args[1], ast.BinOp)
                assert not union, f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_no_network_at_import() -> None:
    code = """
import importlib, pkgutil, socket
def refuse(*args, **kwargs): raise SystemExit(f"the network was asked for: {args}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import dpo_kernels
seen = 0
for module in pkgutil.walk_packages(dpo_kernels.__path__, "dpo_kernels."):
    if not module.name.endswith(("__main__", "._C")) and ".integrations" not in module.name:
        importlib.import_module(module.name)
        seen += 1
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 40


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of this tree, unpacked: what a user without git has."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "runs", "*.so", "*.egg-info", ".*_cache", "__pycache__"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


def build(source: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """`setup.py build_ext` there; DPO_KERNELS_CUDA=0 unless told otherwise."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CUDACXX")}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace", *arguments],
        cwd=source,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**kept, "DPO_KERNELS_CUDA": "0", **env},
    )


def test_sdist_holds_everything(source: Path) -> None:
    for name in (
        "CHANGELOG.md",
        "LICENSE",
        "THIRD_PARTY_NOTICES",
        "Makefile",
        "constraints.txt",
        "csrc/CMakeLists.txt",
        "csrc/cuda/token_logps.cu",
        "csrc/cpu/simd.h",
        "dpo_kernels/py.typed",
        "dpo_kernels/_C.pyi",
        "tests/conftest.py",
        "tests/peers/cases.json.gz",
        "tools/dist.py",
        "docs/clusters.md",
        "dpo_kernels/data/default/train.jsonl",
    ):
        assert (source / name).is_file(), name
    for tree in ("csrc", "tests", "tools", "benchmarks", "dpo_kernels"):
        for path in (ROOT / tree).rglob("*"):
            inside = path.relative_to(ROOT)
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".txt", ".json"):
                assert (source / inside).is_file(), inside


def test_old_compiler(source: Path, tmp_path: Path) -> None:
    old = script(
        tmp_path / "g++-4.8",
        "#!/bin/sh\n"
        'case "$*" in *--version*) echo "g++ (GCC) 4.8.5 20150623"; exit 0;; esac\n'
        "echo \"g++: error: unrecognized command line option '-std=c++17'\" >&2; exit 1\n",
    )
    done = build(source, CXX=str(old))
    assert done.returncode != 0 and "Traceback" not in done.stdout
    for words in (
        f"dpo-kernels: {old} cannot compile C++17 with OpenMP",
        "g++ (GCC) 4.8.5",
        "unrecognized command line option '-std=c++17'",
        "Set CXX to a newer",
    ):
        assert words in done.stdout
    done = build(source, CXX=str(tmp_path / "absent"))
    assert done.returncode != 0 and "no C++ compiler found" in done.stdout


def test_wrong_wishes(source: Path, tmp_path: Path) -> None:
    done = build(source, DPO_KERNELS_CUDA="yes")
    assert done.returncode != 0 and "DPO_KERNELS_CUDA must be 0 or 1, got 'yes'" in done.stdout
    broken = script(tmp_path / "nvcc", "#!/bin/sh\necho 'unsupported GNU version!' >&2; exit 1\n")
    done = build(source, DPO_KERNELS_CUDA="1", CUDACXX=str(broken))
    assert done.returncode != 0 and f'"{broken}"\n\n  is not able to compile' in done.stdout
    assert "DPO_KERNELS_CUDA=0 builds without CUDA kernels" in done.stdout


def test_pip_installs_the_sdist(source: Path, tmp_path: Path) -> None:
    """Offline, with ccache (here a counter of compilations) and MAX_JOBS; then what changed alone
    is compiled again, and the installed package works away from its sources."""
    log = tmp_path / "compiled"
    tools = tmp_path / "bin"
    tools.mkdir()
    script(tools / "ccache", f'#!/bin/sh\necho "$*" >> {log}\nexec "$@"\n')
    path = os.pathsep.join([str(tools), os.environ["PATH"]])

    def compiled() -> list[str]:
        lines = log.read_text().splitlines() if log.is_file() else []
        log.unlink(missing_ok=True)
        return [line for line in lines if " -c " in line]

    site = tmp_path / "site"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX")}
    env = {**kept, "DPO_KERNELS_CUDA": "0", "PATH": path, "MAX_JOBS": "2"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
        str(source),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first = compiled()
    assert len(first) >= 5, first
    (source / "csrc/cpu/pair_loss.cpp").touch()
    done = build(source, PATH=path)
    assert done.returncode == 0, done.stdout
    again = compiled()
    assert len(again) == 1 and "pair_loss.cpp" in again[0], again

    info = next(site.glob("dpo_kernels-*.dist-info"))
    bill = json.loads((info / "sboms" / "dpo-kernels.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX" and bill["specVersion"] == "1.6"
    assert bill["metadata"]["component"]["version"] == dpo_kernels.__version__
    assert [part["name"] for part in bill["components"]] == ["pybind11"]  # no CUDA in this one
    assert "pybind11" in (info / "licenses" / "THIRD_PARTY_NOTICES").read_text()
    code = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
from dpo_kernels.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.sep,
        env={**kept, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(site) in done.stdout and "GPU code: none" in done.stdout
