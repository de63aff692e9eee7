"""Runs one op through each of its tiers: reference, CPU twin, emulated CUDA kernel and, where there is one, a GPU.

    @pytest.mark.parametrize("backend", BACKENDS, ids=str)
    def test_something(backend):
        result = backend.select(scores, keep=3)

A Backend has every function of `lightvlm_ext.ops`, with the same signature. CPU tensors throughout: the tier `cuda`
takes them to the GPU and brings the results back. Its tests carry the mark `gpu` (conftest.py), so that `-m gpu` runs
every test over BACKENDS or NATIVE on the device, and nothing else.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lightvlm_ext
from lightvlm_ext import _library
from tests.emulation.build import build
from tests.ops.moving import Transfer

EMULATED_NAMESPACE = "lightvlm_emulated"


@functools.cache
def emulation_library() -> Path:
    """Path of the emulation library; brought up to date on the first call.

    LIGHTVLM_EMULATION_LIBRARY names one that is built already.
    """
    override = os.environ.get("LIGHTVLM_EMULATION_LIBRARY")
    return Path(override) if override else build()


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
        return self.name in ("emulated", "cuda")

    @property
    def needs_gpu(self) -> bool:
        """Whether its tests carry the mark `gpu`."""
        return self.name == "cuda"

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_"):
            raise AttributeError(op)
        if self.name == "reference":
            return getattr(lightvlm_ext.reference, op)
        return self._wrap(getattr(lightvlm_ext.ops, op))

    def raw(self, op: str) -> Callable[..., Any]:
        """The registered op itself, below its wrapper; the tier `reference` has none."""
        if self.name == "emulated":
            load_emulation()
            return getattr(getattr(torch.ops, EMULATED_NAMESPACE), op).default
        return self._wrap(_library.op(op))

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


class EmulatedBackend(Backend):
    """Sends the wrappers to the CUDA kernels in emulation."""

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def emulated(*args: Any, **kwargs: Any) -> Any:
            load_emulation()
            with _library.use_namespace(EMULATED_NAMESPACE):
                return function(*args, **kwargs)

        return emulated


class DeviceBackend(Backend):
    """Takes the tensors of each call to a device, and back what the call returned or wrote.

    inner: another tier that runs the call there, so that this one can be tested without a GPU.
    """

    def __init__(self, name: str, device: torch.device, inner: Backend | None = None) -> None:
        super().__init__(name)
        self.device = device
        self._inner = inner

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self._inner is not None:
            function = self._inner._wrap(function)

        @functools.wraps(function)
        def moved(*args: Any, **kwargs: Any) -> Any:
            transfer = Transfer(self.device)
            sent, named = transfer.there(args), transfer.there(kwargs)
            try:
                result = function(*sent, **named)
            finally:
                transfer.write_back()
            return transfer.back(result)

        return moved


def has_cuda() -> bool:
    """Whether torch has a GPU and the library that is built has kernels for it."""
    if not torch.cuda.is_available():
        return False
    return lightvlm_ext.is_available() and "cuda" in lightvlm_ext.build_info()["backends"]


REFERENCE = Backend("reference")
CPU = Backend("cpu")
EMULATED = EmulatedBackend("emulated")
CUDA = DeviceBackend("cuda", torch.device("cuda", 0))
_GPU = [CUDA] if has_cuda() else []
BACKENDS = [REFERENCE, CPU, EMULATED, *_GPU]
NATIVE = [CPU, EMULATED, *_GPU]
