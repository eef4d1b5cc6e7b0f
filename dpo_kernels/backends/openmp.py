"""One OpenMP pool: that of torch.

`_C` carries calls into GCC's OpenMP but names no library for them. torch's wheels ship their own
libgomp, under a name that differs between releases (`libgomp.so.1`, `libgomp-a34b3233.so.1`); were
`_C` linked to `libgomp.so.1`, the second kind would leave the process with two pools fighting for
the cores, `torch.set_num_threads` ignored by ours, and an import error where the system has none.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path

# GCC's runtime, LLVM's and Intel's: the latter two have GCC's entry points as well.
_RUNTIME = re.compile(r"lib(gomp|omp|iomp5)(-[0-9a-f]+)?\.so[.0-9]*$")


def mapped() -> list[str]:
    """Files of the OpenMP runtimes in this process, in the order of their addresses."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    paths = (line.split(maxsplit=5)[5:] for line in maps.read_text(errors="replace").splitlines())
    files = (path[0].strip() for path in paths if path)
    return list(dict.fromkeys(f for f in files if _RUNTIME.search(os.path.basename(f))))


@functools.cache
def share() -> str:
    """Make torch's OpenMP visible to `_C`, or the system's where torch has none; its file.

    To be called after torch is imported and before `_C` is. Empty where there is none at all:
    then `_C` does not load, and its error names the missing function.
    """
    torchs_first = sorted(mapped(), key=lambda path: "/torch" not in path)
    for path in [*torchs_first, "libgomp.so.1"]:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return path
    return ""
