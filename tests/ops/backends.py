"""Runs one op through each of its tiers: reference, CPU twin, emulated CUDA kernel.

    @pytest.mark.parametrize("backend", BACKENDS, ids=str)
    def test_something(backend):
        result = backend.select(scores, keep=3)

A Backend has every function of `lightvlm_ext.ops`, with the same signature. CPU tensors throughout.
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
