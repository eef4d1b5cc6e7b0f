"""A CUDA toolkit from PyPI's packages, for machines and build images without one.

    python tools/cuda_toolkit.py FOLDER --version 13.0     then build with CUDA_HOME=FOLDER

Only what this package compiles with: nvcc, the runtime's headers and static library, CCCL. CUDA 13
alone: the packages for CUDA 12 hold ptxas and libnvvm, but no nvcc.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
    "nvidia-cuda-culibos",
)


def assemble(folder: Path, version: str) -> None:
    with tempfile.TemporaryDirectory() as site:
        wanted = [f"{package}=={version}.*" for package in PACKAGES]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, "--no-deps", "--target", site, *wanted], check=True)
        shutil.copytree(Path(site, "nvidia", "cu13"), folder, dirs_exist_ok=True)
    for tool in [*(folder / "bin").iterdir(), *(folder / "nvvm" / "bin").iterdir()]:
        if tool.is_file():
            tool.chmod(0o755)  # wheels do not always keep it
    if not (folder / "lib64").exists():
        (folder / "lib64").symlink_to("lib")  # where nvcc and CMake look


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", default="13.0", help="major.minor, default: %(default)s")
    args = parser.parse_args()
    if not args.version.startswith("13."):
        parser.error(f"--version must be 13.x, got {args.version}")
    assemble(args.folder.resolve(), args.version)
    nvcc = args.folder.resolve() / "bin" / "nvcc"
    print(subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
