"""The wheel's glibc: linked against the symbols of an old one, and checked for newer ones.

`link_flags` makes a folder for the linker's `-L`. In it lie stubs of glibc's libraries as they
were in `GLIBC` (out of PyPI's `ziglang`, which knows the symbols of every release) and linker
scripts that add `old_runtime.cpp` to the C and C++ libraries. The compiler stays the machine's own.

`too_new` names the symbols of a binary that a system of that glibc does not have. auditwheel sees
versions only; a symbol without one, as a stub lacking it leaves behind, it does not see.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# The manylinux_2_28 profile, which torch's own wheels have: RHEL 8, Ubuntu 20.04, Debian 11.
GLIBC = (2, 28)
NEWEST = {"GLIBC": GLIBC, "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
LIBC, LOADER = "libc.so.6", "libld.so.2"  # the loader's name in ziglang; its soname is its own
LIBRARIES = {"m": "libm.so.6", "pthread": "libpthread.so.0", "dl": "libdl.so.2", "rt": "librt.so.1"}
RUNTIME = Path(__file__).with_name("old_runtime.cpp")
ZIG = (sys.executable, "-m", "ziglang", "cc")
# Python's and OpenMP's are found in the process; the weak ones may be absent.
UNVERSIONED = re.compile(r"_?Py|GOMP_|omp_|_ITM_|__gmon_start__$")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(c) for c in command], text=True, capture_output=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def link_flags(folder: Path) -> str:
    """Fill `folder`, and return the compiler's flags that link for glibc `GLIBC` with it."""
    compiler = os.environ.get("CXX", "c++")

    def static(name: str) -> str:
        return run(compiler, f"-print-file-name={name}").strip()

    for name, path in stubs(folder).items():
        shutil.copy(path, folder / name)
    for library, name in LIBRARIES.items():
        (folder / f"lib{library}.so").symlink_to(name)
    extra = folder / "libold_runtime.a"
    run(compiler, "-std=c++17", "-O2", "-fPIC", "-c", RUNTIME, "-o", extra.with_suffix(".o"))
    run("ar", "rcsD", extra, extra.with_suffix(".o"))
    # These stand before the machine's own scripts of the same names. libc_nonshared: atexit.
    libc = f"{folder / LIBC} {static('libc_nonshared.a')} AS_NEEDED({folder / LOADER}) {extra}"
    (folder / "libc.so").write_text(f"GROUP({libc})\n")
    (folder / "libstdc++.so").write_text(f"GROUP({extra} {static('libstdc++.so')})\n")
    # For CMake's probes, which are programs: the machine's own libraries ask for newer symbols.
    return f"-L{folder} -Wl,--allow-shlib-undefined"


def stubs(folder: Path) -> dict[str, Path]:
    """Name -> file of glibc's libraries with the symbols of `GLIBC` and no code."""
    target = f"{platform.machine()}-linux-gnu.{'.'.join(map(str, GLIBC))}"
    cache = folder / "zig"
    env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    nothing = folder / "nothing.c"
    nothing.write_text("int dpo_kernels_nothing;\n")
    libraries = [f"-l{name}" for name in LIBRARIES]
    run(*ZIG, "-target", target, "-shared", nothing, *libraries, "-o", folder / "no.so", env=env)
    wanted = (LIBC, LOADER, *LIBRARIES.values())
    found = {name: path for name in wanted for path in [*cache.rglob(name)][:1]}
    if len(found) < len(wanted):
        raise SystemExit(f"ziglang made only {', '.join(found) or 'nothing'} for {target}")
    return found


def undefined(binary: Path) -> Iterator[tuple[str, str]]:
    """(symbol, version or nothing) of what a binary takes from elsewhere, by binutils' readelf."""
    for line in run("readelf", "--dyn-syms", "--wide", binary).splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[6] == "UND":
            name, _, version = fields[7].partition("@")
            yield name, version.lstrip("@")


def too_new(binary: Path) -> list[str]:
    """The symbols that the oldest system does not have, with their versions."""
    found = []
    for name, version in undefined(binary):
        kind, _, numbers = version.partition("_")
        if kind in NEWEST:
            if numbers == "PRIVATE" or tuple(map(int, numbers.split("."))) > NEWEST[kind]:
                found.append(f"{name}@{version}")
        elif not version and not UNVERSIONED.match(name):
            found.append(f"{name} (of no version)")
    return sorted(found)
