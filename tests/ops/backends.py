"""Runs one op through each of its tiers: reference, CPU twin, emulated CUDA kernel.

    @pytest.mark.parametrize("backend", BACKENDS, ids=str)
    def test_something(backend):
        result = backend.select(scores, keep=3)

A Backend has every function of `lightvlm_ext.ops`, with the same signature. CPU tensors throughout.
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lightvlm_ext
from lightvlm_ext import _library

ROOT = Path(__file__).resolve().parents[2]
EMULATED_NAMESPACE = "lightvlm_emulated"


@functools.cache
def emulation_library() -> Path:
    """Path of the emulation library; built on the first call, in build/emulation.

    LIGHTVLM_EMULATION_LIBRARY names one that is built already.
    """
    override = os.environ.get("LIGHTVLM_EMULATION_LIBRARY")
    if override:
        return Path(override)
    build = ROOT / "build" / "emulation"
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        configure += ["-DLIGHTVLM_NATIVE=OFF", "-DLIGHTVLM_EMULATION=ON"]
        jobs = os.environ.get("MAX_JOBS", "2")
        for command in (configure, ["cmake", "--build", str(build), "-j", jobs]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return build / "lightvlm_emulation.so"


@functools.cache
def load_emulation() -> None:
    """Registers the namespace lightvlm_emulated."""
    torch.ops.load_library(str(emulation_library()))


class Backend:
    """One tier under the interface of `lightvlm_ext.ops`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    @property
    def is_device(self) -> bool:
        """Whether bad values go to the device error word instead of raising."""
        return self.name == "emulated"

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_"):
            raise AttributeError(op)
        if self.name == "reference":
            return getattr(lightvlm_ext.reference, op)
        function = getattr(lightvlm_ext.ops, op)
        if self.name == "cpu":
            return function

        @functools.wraps(function)
        def emulated(*args: Any, **kwargs: Any) -> Any:
            load_emulation()
            with _library.use_namespace(EMULATED_NAMESPACE):
                return function(*args, **kwargs)

        return emulated


REFERENCE = Backend("reference")
CPU = Backend("cpu")
EMULATED = Backend("emulated")
BACKENDS = [REFERENCE, CPU, EMULATED]
NATIVE = [CPU, EMULATED]
