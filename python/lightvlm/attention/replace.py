"""Modules named flash_attn for code that imports that package itself."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Iterator, Mapping
from types import ModuleType

from . import gpu, padding
from .rotary import apply_rotary_emb

PACKAGE = "flash_attn"
VERSION = "2.8.3"
"""The flash-attn whose signatures these are."""

_lock = threading.Lock()
_users = 0
_before: dict[str, ModuleType] = {}


@contextlib.contextmanager
def replace_flash_attn(*, override: bool = False) -> Iterator[None]:
    """``import flash_attn`` finds this package's functions in this context.

    For modelling code that is not ours (``trust_remote_code=True``) and imports flash_attn, or its
    flash_attn_interface, bert_padding or layers.rotary, by itself: load the model in this context. What that code
    imported stays with it afterwards, so the model runs outside of the context, too.

    Where the real flash-attn is installed, nothing happens, unless ``override``. What is replaced is sys.modules, so
    all threads see it; contexts may be nested and overlap between threads, and the last one that ends restores what was
    there, also when it ends with an exception. transformers' own is_flash_attn_2_available() asks for an installed
    distribution and goes on saying that there is none: docs/attention.md shows what to do about code that asks it.
    """
    replaced = _enter(override)
    try:
        yield
    finally:
        if replaced:
            _leave()


def _enter(override: bool) -> bool:
    """Whether this context counts as one of the users of the replacement."""
    global _users
    with _lock:
        if _users == 0:
            if not override and _installed():
                return False
            # Backends look up the real package by its name, once: they must not find what stands in for it, which would
            # call them in turn.
            gpu.package(PACKAGE)
            gpu.package(f"{PACKAGE}.cute", PACKAGE)
            _before.update(_remove())
            sys.modules.update(_make())
        _users += 1
        return True


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            _remove()
            sys.modules.update(_before)
            _before.clear()
            _forget_answers()


def _installed() -> bool:
    if sys.modules.get(PACKAGE) is not None:
        return True
    return importlib.util.find_spec(PACKAGE) is not None


def _remove() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]
    return {name: sys.modules.pop(name) for name in names}


def _make() -> dict[str, ModuleType]:
    from .. import flash_attn_interface

    functions = {
        name: getattr(flash_attn_interface, name)
        for name in flash_attn_interface.__all__
        if name.startswith("flash_attn_")
    }
    of_padding = ("index_first_axis", "index_put_first_axis", "pad_input", "unpad_input")
    rotary = dict.fromkeys(("apply_rotary_emb", "apply_rotary_emb_func"), apply_rotary_emb)
    modules = [
        _module(PACKAGE, functions | {"__version__": VERSION}, is_package=True),
        _module(f"{PACKAGE}.flash_attn_interface", functions),
        _module(f"{PACKAGE}.bert_padding", {name: getattr(padding, name) for name in of_padding}),
        _module(f"{PACKAGE}.layers", {}, is_package=True),
        _module(f"{PACKAGE}.layers.rotary", rotary),
    ]
    made = {module.__name__: module for module in modules}
    for name, module in made.items():  # a part is an attribute of what it is a part of
        parent, _, part = name.rpartition(".")
        if parent:
            setattr(made[parent], part, module)
    return made


def _module(name: str, content: Mapping[str, object], is_package: bool = False) -> ModuleType:
    module = ModuleType(name, f"{name} {VERSION}, as lightvlm.replace_flash_attn() stands in for it.")
    # A spec, because importlib.util.find_spec() takes a module without one for an error.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="lightvlm", is_package=is_package)
    module.__package__ = name if is_package else name.rpartition(".")[0]
    if is_package:
        module.__path__ = []  # of its other parts there are none
    vars(module).update(content)
    return module


def _forget_answers() -> None:
    """transformers remembers what it found out about flash-attn; what it did in the context is not so any more."""
    found = sys.modules.get("transformers.utils.import_utils")
    for name, function in list(vars(found).items()) if found is not None else []:
        clear = getattr(function, "cache_clear", None)
        if "flash_attn" in name and clear is not None:
            clear()
