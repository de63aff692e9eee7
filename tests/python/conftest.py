"""Fixtures of the Python layer's tests: tiny models, built once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from python.matrix import build
from python.tiny import INTERNVL, LLAVA, QWEN, Family


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models spend their time waiting for threads, most of all on a machine that has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _models() -> dict[Any, Any]:
    return {}


@pytest.fixture(params=[LLAVA, INTERNVL, QWEN], ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def model(family: Family, _models: dict[Any, Any]) -> Iterator[Any]:
    """A tiny fp32 model of each family."""
    yield from _shared(family, torch.float32, _models)


@pytest.fixture
def llava(_models: dict[Any, Any]) -> Iterator[Any]:
    yield from _shared(LLAVA, torch.float32, _models)


@pytest.fixture
def qwen(_models: dict[Any, Any]) -> Iterator[Any]:
    yield from _shared(QWEN, torch.float32, _models)


@pytest.fixture
def small(family: Family, _models: dict[Any, Any]) -> Iterator[Any]:
    """The method matrix's fp32 model of each family."""
    yield from _shared(family, torch.float32, _models, build)


@pytest.fixture
def small_bf16(family: Family, _models: dict[Any, Any]) -> Iterator[Any]:
    """The same in bf16."""
    yield from _shared(family, torch.bfloat16, _models, build)


def _shared(
    family: Family, dtype: torch.dtype, models: dict[Any, Any], make: Callable[..., Any] = Family.build
) -> Iterator[Any]:
    """A model that tests share, because each must leave it as it was: checked after every test."""
    key = (make, family.name, dtype)
    if key not in models:
        models[key] = make(family, dtype)
    found = models[key]
    yield found
    configs = [
        module.config for module in found.modules() if hasattr(module, "config")
    ]  # the vision tower's, too
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    assert not any(ours(hook) for module in found.modules() for hook in hooks(module))


def hooks(module: torch.nn.Module) -> list[Any]:
    """Forward hooks of a module. transformers has some of its own."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def ours(hook: Any) -> bool:
    """Whether a hook is lightvlm's."""
    return type(getattr(hook, "__self__", hook)).__module__.startswith("lightvlm")
