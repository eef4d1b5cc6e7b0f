"""Build dpo_kernels._C with CMake and Ninja. Needs a C++17 compiler; needs no torch and no GPU.

CUDA kernels are built where nvcc is found. DPO_KERNELS_CUDA=0 leaves them out, 1 insists on them;
DPO_KERNELS_ARCHS="90;100" names other GPU architectures; MAX_JOBS bounds the parallel jobs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_compiler() -> str:
    """The C++ compiler to use; an error that names the package to install if there is none."""
    wish = os.environ.get("CXX")
    for name in [wish] if wish else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    looked = f"CXX={wish}" if wish else "c++, g++, clang++"
    raise SystemExit(
        f"dpo-kernels: no C++ compiler found (looked for {looked}).\n"
        "Install one: 'apt-get install g++' (Debian, Ubuntu), 'dnf install gcc-c++' (Fedora, "
        "RHEL), or set CXX to its path."
    )


def cuda_options() -> list[str]:
    wish, archs = os.environ.get("DPO_KERNELS_CUDA", "AUTO"), os.environ.get("DPO_KERNELS_ARCHS")
    if wish not in ("AUTO", "0", "1"):
        raise SystemExit(f"dpo-kernels: DPO_KERNELS_CUDA must be 0 or 1, got {wish!r}")
    chosen = [f"-DDPO_ARCHS={archs.replace(',', ';')}"] if archs else []
    return [f"-DDPO_CUDA={wish}", *chosen]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = find_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # Without pip's isolation cmake and ninja lie beside the interpreter, not on the PATH.
        beside = str(Path(sys.executable).parent)
        env = {**os.environ, "PATH": os.pathsep.join([beside, os.environ.get("PATH", "")])}
        subprocess.run(
            [
                "cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_CXX_COMPILER={compiler}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *cuda_options(),
            ],
            check=True,
            env=env,
        )  # fmt: skip
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(["cmake", "--build", str(build), *jobs], check=True, env=env)


setup(ext_modules=[Extension("dpo_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
