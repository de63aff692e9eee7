"""Builds the native targets with CMake and maps the two packages. See CMakeLists.txt for the rest.

Environment: LIGHTVLM_CUDA=auto|on|off, MAX_JOBS, CMAKE_ARGS, TORCH_CUDA_ARCH_LIST, CUDACXX.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OUTPUTS = ("lightvlm_ext/_C.so", f"lightvlm_ext/_host{sysconfig.get_config_var('EXT_SUFFIX')}")


class CMakeBuild(build_ext):
    """Configures, builds and installs into the build directory, or into the tree for `pip -e`."""

    def run(self) -> None:
        destination = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = Path(self.build_temp).resolve()
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DLIGHTVLM_CUDA={os.environ.get('LIGHTVLM_CUDA', 'auto')}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS")
        # cmake and ninja of this Python's environment, activated or not, before whatever else PATH has.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        for command in (
            configure,
            ["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])],
            ["cmake", "--install", str(build), "--prefix", str(destination)],
        ):
            # env(1) looks its command up in the new PATH; subprocess alone would use the old one.
            subprocess.run(["env", f"PATH={path}", *command], check=True)

    def _outputs(self) -> list[str]:
        """What was installed; the notes on kernels are there where nvcc was."""
        notes = "lightvlm_ext/_C.kernels.json"
        with_cuda = (Path(self.build_temp) / Path(notes).name).exists()
        return [*OUTPUTS, notes] if with_cuda else [*OUTPUTS]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / output) for output in self._outputs()]

    def get_output_mapping(self) -> dict[str, str]:
        return (
            {str(Path(self.build_lib) / output): output for output in self._outputs()} if self.inplace else {}
        )


setup(
    packages=[*find_packages(".", include=["lightvlm_ext*"]), *find_packages("python")],
    package_dir={"lightvlm_ext": "lightvlm_ext", "lightvlm": "python/lightvlm"},
    # Named so that the wheel is one of this platform and Python; CMake knows the sources.
    ext_modules=[Extension("lightvlm_ext._C", []), Extension("lightvlm_ext._host", [])],
    cmdclass={"build_ext": CMakeBuild},
)
