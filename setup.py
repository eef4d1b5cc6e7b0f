"""Build dpo_kernels._C with CMake and Ninja. Needs a C++17 compiler; needs no torch and no GPU.

CUDA kernels are built where nvcc is found. DPO_KERNELS_CUDA=0 leaves them out, 1 insists on them;
DPO_KERNELS_ARCHS="90;100" names other GPU architectures; CXX chooses the compiler, CUDACXX or
CUDA_HOME the nvcc; MAX_JOBS bounds the parallel jobs; ccache is used where it is installed.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# One folder for each interpreter, kept between builds: the next one compiles what changed.
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
TOOLCHAIN = BUILD / "toolchain.json"  # written by CMakeLists.txt

PROBE = """
#if __cplusplus < 201703L
#error "this compiler knows no C++17"
#endif
#include <omp.h>
#include <optional>
#include <string_view>
int main() {
  std::optional<std::string_view> none;
  if (const bool empty = !none; empty) return omp_get_max_threads() == 0;
}
"""


def stop(message: str) -> NoReturn:
    raise SystemExit(f"dpo-kernels: {message}")


def find_compiler() -> str:
    """The C++ compiler to use; an error that names the package to install if there is none."""
    wish = os.environ.get("CXX")
    for name in [wish] if wish else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            check_compiler(path)
            return path
    looked = f"CXX={wish}" if wish else "c++, g++, clang++"
    stop(
        f"no C++ compiler found (looked for {looked}).\n"
        "Install one: 'apt-get install g++' (Debian, Ubuntu), 'dnf install gcc-c++' (Fedora, "
        "RHEL), or set CXX to its path."
    )


def check_compiler(path: str) -> None:
    """C++17 and OpenMP, before CMake says the same at length."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        command = [path, "-std=c++17", "-fopenmp", "-c", str(source), "-o", f"{source}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no output"]
        stop(
            f"{path} cannot compile C++17 with OpenMP.\n"
            f"  version: {(version.splitlines() or ['unknown'])[0]}\n"
            f"  it says: {errors[0].strip()}\n"
            "Set CXX to a newer compiler (GCC 9 or later): 'module load gcc' on many clusters, "
            "'dnf install gcc-toolset-12' on RHEL; clang needs libomp-dev beside it."
        )


def find_tool(name: str) -> str:
    """cmake or ninja; without pip's isolation they lie beside the interpreter, not on the PATH."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if not found:
        stop(f"{name} not found: pip install {name} (pip's own isolation brings it)")
    return found


def check_headers() -> None:
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        stop(
            f"the headers of this Python are missing ({header}): 'apt-get install python3-dev' "
            "(Debian, Ubuntu), 'dnf install python3-devel' (Fedora, RHEL)."
        )


def cuda_options() -> list[str]:
    wish, archs = os.environ.get("DPO_KERNELS_CUDA", "AUTO"), os.environ.get("DPO_KERNELS_ARCHS")
    if wish not in ("AUTO", "0", "1"):
        stop(f"DPO_KERNELS_CUDA must be 0 or 1, got {wish!r}")
    # Always given: CMake's cache would keep what an earlier build was told.
    chosen = f"-DDPO_ARCHS={archs.replace(',', ';')}" if archs else "-UDPO_ARCHS"
    return [f"-DDPO_CUDA={wish}", chosen]


def launchers() -> list[str]:
    """ccache where it is; CMAKE_CXX_COMPILER_LAUNCHER in the environment names another."""
    if not (ccache := shutil.which("ccache")) or "CMAKE_CXX_COMPILER_LAUNCHER" in os.environ:
        return []
    return [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in ("CXX", "CUDA")]


def fresh_unless_same(compiler: str) -> None:
    """Empty the build folder where CMake's cache speaks of another toolchain than is asked for."""
    names = (
        *("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "NVCC_CCBIN"),
        *("CXXFLAGS", "LDFLAGS"),
    )
    asked = {"compiler": compiler, "nvcc": shutil.which("nvcc")}
    text = json.dumps({**asked, **{name: os.environ.get(name) for name in names}})
    record = BUILD / "asked.json"
    if not record.is_file() or record.read_text() != text:
        shutil.rmtree(BUILD, ignore_errors=True)
        BUILD.mkdir(parents=True)
        record.write_text(text)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        check_headers()
        compiler, cmake, ninja = find_compiler(), find_tool("cmake"), find_tool("ninja")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        fresh_unless_same(compiler)
        configure = [
            cmake,
            "-S",
            str(ROOT / "csrc"),
            "-B",
            str(BUILD),
            "-G",
            "Ninja",
            # Given each time: pip's isolation is gone when the next build reads CMake's cache.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *cuda_options(),
            *launchers(),
        ]
        if subprocess.run(configure).returncode:
            stop(
                "CMake could not configure the build; its own words are above.\n"
                "If they are about nvcc: CUDA 12 or 13 is needed, with a host compiler it takes "
                "(CUDAHOSTCXX names one); DPO_KERNELS_CUDA=0 builds without CUDA kernels."
            )
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([cmake, "--build", str(BUILD), *jobs]).returncode:
            stop(
                "the compilation failed; the compiler's words are above. Where it was killed for "
                "memory, MAX_JOBS=1 takes the least."
            )


class WheelWithSBOM(bdist_wheel):
    def write_wheelfile(self, wheelfile_base: str, *args, **kwargs) -> None:
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        if not TOOLCHAIN.is_file():
            return  # an editable install writes this before it builds; it ships nothing
        folder = Path(wheelfile_base, "sboms")
        folder.mkdir(exist_ok=True)
        bom = software_bill(self.distribution.get_version())
        (folder / "dpo-kernels.cdx.json").write_text(json.dumps(bom, indent=2) + "\n")


def software_bill(version: str) -> dict:
    """What the binary holds besides our own code, as CycloneDX (PEP 770); THIRD_PARTY_NOTICES
    has the licences."""
    toolchain = json.loads(TOOLCHAIN.read_text())

    def component(name: str, version: str, licence: dict, **more: object) -> dict:
        return {
            "type": "library",
            "bom-ref": name,
            "name": name,
            "version": version,
            "licenses": [{"license": licence}],
            **more,
        }

    pybind11 = metadata.version("pybind11")
    parts = [
        component(
            "pybind11", pybind11, {"id": "BSD-3-Clause"}, purl=f"pkg:pypi/pybind11@{pybind11}"
        )
    ]
    if toolchain["cuda"]:
        parts.append(
            component(
                "cuda-runtime-static",
                toolchain["cuda"],
                {"name": "NVIDIA CUDA Toolkit EULA"},
                supplier={"name": "NVIDIA Corporation"},
                description=f"libcudart_static and device code for {toolchain['architectures']}",
            )
        )
    purl = f"pkg:pypi/dpo-kernels@{version}"
    ours = component("dpo-kernels", version, {"id": "Apache-2.0"}, purl=purl)
    stated: dict = {"component": {**ours, "bom-ref": purl}}
    stated["tools"] = {"components": [{"type": "application", "name": toolchain["compiler"]}]}
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        made = datetime.fromtimestamp(int(epoch), timezone.utc)
        stated["timestamp"] = made.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": stated,
        "components": parts,
        "dependencies": [{"ref": purl, "dependsOn": [part["bom-ref"] for part in parts]}],
    }


setup(
    ext_modules=[Extension("dpo_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": WheelWithSBOM},
)
