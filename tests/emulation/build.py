"""Builds ``lightvlm_emulation``, the CUDA kernel sources compiled for the CPU, and talks to it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Kind = Literal["plain", "asan"]

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS: dict[Kind, str] = {"plain": "emulation", "asan": "emulation-asan"}
# A GPU faults on a vector access that is not aligned to the vector's size; x86 may let it pass.
_SANITIZERS: dict[Kind, list[str]] = {
    "plain": ["-DLIGHTVLM_ASAN=OFF"],
    "asan": [
        "-DLIGHTVLM_ASAN=ON",
        "-DCMAKE_CXX_FLAGS=-fsanitize=alignment -fno-sanitize-recover=alignment",
    ],
}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for one process at a time: pytest workers and sessions share build folders."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_checked(command: list[str]) -> None:
    """Runs ``command`` in the repository root; a failure raises RuntimeError with its output."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-8000:]
        raise RuntimeError(f"exit status {done.returncode}: {' '.join(command)}\n{output}")


def build(kind: Kind = "plain") -> Path:
    """Configures and builds CMake's target ``lightvlm_emulation``; nothing is rebuilt that is up to date.

    Args:
        kind: ``"plain"``, or ``"asan"`` for AddressSanitizer and checks of alignment (load it under
            :func:`asan_env` only).

    Returns:
        The shared object, for ``torch.ops.load_library``: ops are in ``torch.ops.lightvlm_emulated``.

    Raises:
        ValueError: an unknown ``kind``.
        RuntimeError: CMake or the compiler failed; the message ends with their output.
    """
    if kind not in _FOLDERS:
        raise ValueError(f"kind: got {kind!r}, wants one of {sorted(_FOLDERS)}")
    folder = ROOT / "build" / _FOLDERS[kind]
    with locked(folder):
        run_checked(
            [
                *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
                *("-DLIGHTVLM_EMULATION=ON", "-DLIGHTVLM_NATIVE=OFF"),
                f"-DPython_EXECUTABLE={sys.executable}",
                *_SANITIZERS[kind],
            ]
        )
        run_checked(["cmake", "--build", str(folder), "--target", "lightvlm_emulation", "-j", "2"])
    return folder / "lightvlm_emulation.so"


def asan_env() -> dict[str, str]:
    """The environment in which Python can load a library built with AddressSanitizer, for ``subprocess.run``.

    AddressSanitizer has to be in the process from the start, and libstdc++ with it, or it does not find the
    functions it wraps when the first C++ exception is thrown. Python allocates through malloc, so that its
    buffers have red zones too. Leaks are not looked for: the interpreter leaves many.
    """
    libraries = [_compiler_file("libasan.so"), _compiler_file("libstdc++.so")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "PYTHONMALLOC": "malloc",
    }


def _compiler_file(name: str) -> str:
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        raise RuntimeError(f"{command[0]} has no {name}: install the compiler's sanitizer libraries")
    return os.path.realpath(path)


class Control:
    """What the emulator in a loaded shared object has counted and found."""

    def __init__(self, library: Path) -> None:
        """``library``: from :func:`build`; torch must be imported already."""
        self._library = ctypes.CDLL(str(library))
        self._library.lightvlm_emulation_launch_count.restype = ctypes.c_uint64
        self._library.lightvlm_emulation_launch_count.argtypes = [ctypes.c_char_p]
        self._library.lightvlm_emulation_last_error.restype = ctypes.c_char_p

    def launch_count(self, kernel: str) -> int:
        """How often ``kernel`` (the name its launcher gives) ran to its end since the last reset."""
        return int(self._library.lightvlm_emulation_launch_count(kernel.encode()))

    def reset_launch_counts(self) -> None:
        """Sets all counts to 0."""
        self._library.lightvlm_emulation_reset_launch_counts()

    def last_error(self) -> str:
        """What went wrong in the latest launch that failed; empty if none did."""
        message: bytes = self._library.lightvlm_emulation_last_error()
        return message.decode()
