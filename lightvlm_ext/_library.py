"""Finds and loads the compiled ops, once, at the first use."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_NAMESPACE = "lightvlm"
_lock = threading.Lock()
_loaded: Path | None = None
# The namespace that the wrappers call; the tests put the emulated one here.
_namespace = _NAMESPACE
# Overloads found so far, by namespace and name: torch looks through three objects for one.
_ops: dict[tuple[str, str], Callable[..., Any]] = {}
_fakes: list[tuple[str, Callable[..., Any]]] = []


def library_path() -> Path:
    """Path of the shared object. LIGHTVLM_LIBRARY names another one, of a build folder say."""
    override = os.environ.get("LIGHTVLM_LIBRARY")
    return Path(override) if override else Path(__file__).with_name("_C.so")


def load(path: Path | None = None) -> None:
    """Loads the library and registers the fake kernels. Does nothing the second time.

    Raises:
        ImportError: the library is not built, or does not fit the torch that runs.
    """
    global _loaded
    if _loaded is not None:
        return
    with _lock:
        if _loaded is not None:
            return
        path = path or library_path()
        if not path.exists():
            raise ImportError(
                f"lightvlm_ext: the compiled library is missing at {path}. Build it with "
                "`pip install --no-build-isolation .` (or `-e .`); importing the package and "
                "lightvlm_ext.reference work without it."
            )
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise ImportError(
                f"lightvlm_ext: cannot load {path} beside torch {torch.__version__}: "
                f"{error.__cause__ or error}. Needs torch >= 2.10; rebuild it if torch is that new."
            ) from error
        for name, fake in _fakes:
            if hasattr(torch.ops.lightvlm, name):  # an older build lacks the newest ops: see op()
                torch.library.register_fake(f"{_NAMESPACE}::{name}", fake)
                # here, as what a compiled function looks up must not change after its first call
                _ops[_NAMESPACE, name] = getattr(torch.ops.lightvlm, name).default
        _loaded = path


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares the fake kernel of lightvlm::name; registered when the library is loaded."""

    def declare(fake: Callable[..., Any]) -> Callable[..., Any]:
        _fakes.append((name, fake))
        return fake

    return declare


def fakes() -> dict[str, Callable[..., Any]]:
    """The fake kernels declared so far, by op."""
    return dict(_fakes)


def op(name: str) -> Callable[..., Any]:
    """The compiled op lightvlm::name.

    Raises:
        ImportError: the library is missing, does not load, or was built before this op was added.
    """
    found = _ops.get((_namespace, name))
    if found is not None:
        return found
    if _loaded is None:
        load()
    packet = getattr(getattr(torch.ops, _namespace), name, None)
    if packet is None:
        raise ImportError(
            f"lightvlm_ext: the library {_loaded} has no op {_namespace}::{name}: it is older than this "
            "package; rebuild it with `pip install --no-build-isolation .` (or `-e .`)"
        )
    return _ops.setdefault((_namespace, name), packet.default)


def is_emulated() -> bool:
    """Whether the wrappers call the emulated CUDA kernels (development build, tests)."""
    return _namespace != _NAMESPACE


@contextlib.contextmanager
def use_namespace(namespace: str) -> Iterator[None]:
    """Sends the wrappers to another namespace with the same schemas. For tests."""
    global _namespace
    previous, _namespace = _namespace, namespace
    try:
        yield
    finally:
        _namespace = previous


def is_available() -> bool:
    """Whether the compiled library is there and loads."""
    try:
        load()
    except ImportError:
        return False
    return True


def _handle() -> ctypes.CDLL:
    load()
    assert _loaded is not None
    handle = ctypes.CDLL(str(_loaded))
    handle.lightvlm_build_info.restype = ctypes.c_char_p
    handle.lightvlm_describe_error.restype = ctypes.c_char_p
    handle.lightvlm_describe_error.argtypes = [ctypes.c_int32]
    return handle


def build_info() -> dict[str, Any]:
    """What the compiled library is.

    Returns:
        version: of the library.   backends: "cpu" and, where it was built, "cuda".
        cuda_arches: as CMake names them, e.g. "90a-real".   compiler, nvcc: with versions, nvcc ""
        without CUDA.   torch: the version built with.   cuda_reason: why CUDA is missing, or "".

    Raises:
        ImportError: the library is missing or does not load.
    """
    info: dict[str, Any] = json.loads(_handle().lightvlm_build_info())
    return info


def describe_error(bit: int) -> str:
    """What a bit of the device error word means; "" for a bit that has no meaning."""
    text: bytes | None = _handle().lightvlm_describe_error(bit)
    return text.decode() if text else ""


def check_backend(device: torch.device) -> None:
    """Raises ValueError where the library has no kernels for the device."""
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise ValueError(f"lightvlm_ext: tensors are on {device}, must be on cpu or cuda")
    info = _backends()
    if "cuda" not in info["backends"]:
        raise ValueError(
            f"lightvlm_ext: tensors are on {device}, but this build has no CUDA backend: "
            f"{info['cuda_reason']}"
        )


_backends_cache: dict[str, Any] = {}


def _backends() -> dict[str, Any]:
    if not _backends_cache:
        _backends_cache.update(build_info())
    return _backends_cache
