"""Compiles ``self_test.cu`` with the emulator, and calls its kernels on numpy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.emulation.build import ROOT, Control, asan_env, locked, run_checked

Variant = Literal["plain", "asan", "ucontext"]

_FLAGS: dict[Variant, list[str]] = {
    "plain": [],
    "asan": ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-g1"],
    "ucontext": ["-DLIGHTVLM_EMULATION_UCONTEXT"],
}
_FOLDER = ROOT / "build" / "emulation-self-test"
_COMMON = ROOT / "csrc" / "common"
_HERE = Path(__file__).parent
_SOURCES = [_HERE / "self_test.cu", _HERE / "emulation.cpp"]

LAUNCH_FAILURE = 719
INVALID_CONFIGURATION = 9
INVALID_VALUE = 1


def compile_self_test(variant: Variant = "plain") -> Path:
    """The shared object for ``variant``, compiled only if a source or a flag has changed."""
    command = [
        *(os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror"),
        *("-shared", "-fPIC", "-fvisibility=hidden"),
        *("-DLIGHTVLM_EMULATION", "-I", "csrc", "-I", "tests/emulation"),
        *_FLAGS[variant],
        *("-x", "c++", *map(str, _SOURCES)),
    ]
    headers = [*_HERE.glob("*.h"), *_COMMON.glob("*.h"), *_COMMON.glob("*.cuh")]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in [*_SOURCES, *sorted(headers)]:
        digest.update(path.read_bytes())
    library = _FOLDER / f"self_test-{variant}-{digest.hexdigest()[:16]}.so"
    with locked(_FOLDER):
        if not library.exists():
            for old in _FOLDER.glob(f"self_test-{variant}-*.so"):
                old.unlink()
            unfinished = library.with_suffix(".tmp")
            run_checked([*command, "-o", str(unfinished)])
            unfinished.rename(library)
    return library


def compile_with_nvcc(architecture: str, folder: Path) -> bool:
    """Compiles ``self_test.cu`` for a GPU such as ``"90a"``; False where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return False
    run_checked(
        [
            *("nvcc", "-std=c++20", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"),
            *("-Werror", "all-warnings", "-I", "csrc", "-c", str(_SOURCES[0])),
            *("-o", str(folder / "self_test.o")),
        ]
    )
    return True


class SelfTest(Control):
    """The functions of ``self_test.cu``. numpy arrays go as pointers, Python integers as int."""

    def call(self, function: str, *arguments: Any) -> int:
        """Calls ``function`` and returns its CUDA error code."""
        converted = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
        return int(getattr(self._library, function)(*converted))


def run_under_asan(statements: str) -> subprocess.CompletedProcess[str]:
    """Runs ``statements`` in a fresh Python under AddressSanitizer; ``t`` is a :class:`SelfTest`."""
    program = (
        "import numpy as np\nfrom ctypes import c_int64\nfrom pathlib import Path\n"
        "from tests.emulation.self_test import SelfTest\n"
        f"t = SelfTest(Path({str(compile_self_test('asan'))!r}))\n{statements}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=asan_env(), capture_output=True, text=True
    )
