"""Modules named flash_attn for code that imports that package itself."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import lightvlm
import pytest
import torch
from lightvlm import flash_attn_interface as ours
from lightvlm import replace_flash_attn
from lightvlm.attention import gpu, rotary
from transformers.utils import import_utils

installed = pytest.mark.skipif(
    "flash_attn" in packages_distributions(), reason="flash-attn is installed, and transformers knows it"
)

REMOTE = '''
"""A modelling file as they come with checkpoints."""
import importlib.util

import torch
from torch import nn

if importlib.util.find_spec("flash_attn") is not None:
    import flash_attn
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_with_kvcache

    NEW = tuple(int(part) for part in flash_attn.__version__.split(".")[:2]) >= (2, 1)


class Attention(nn.Module):
    """Causal self-attention of padded rows (B, S, C)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask):
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1)
        tokens, indices, ends, longest = unpad_input(qkv, mask)[:4]
        q, k, v = tokens.unbind(1)
        out = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, dropout_p=0.0, causal=True)
        return self.out(pad_input(out.flatten(1), indices, batch, length))
'''


@pytest.fixture(autouse=True)
def _nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins without flash_attn, installed or not, and leaves all that imports look at as it was."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        missing = name.startswith("flash_attn") and name not in sys.modules
        return None if missing else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    before = list(sys.path), list(sys.meta_path), list(sys.path_hooks)
    gpu.package.cache_clear()
    yield
    gpu.package.cache_clear()
    assert not [name for name in sys.modules if name.startswith("flash_attn")]
    assert (list(sys.path), list(sys.meta_path), list(sys.path_hooks)) == before


def test_code_that_imports_flash_attn(tmp_path: Path) -> None:
    """Loaded in the context, run after it."""
    path = tmp_path / "modelling_remote.py"
    path.write_text(REMOTE)
    spec = importlib.util.spec_from_file_location("modelling_remote", path)
    assert spec is not None
    assert spec.loader is not None
    remote = importlib.util.module_from_spec(spec)
    with replace_flash_attn():
        spec.loader.exec_module(remote)
    assert remote.NEW
    assert remote.flash_attn_with_kvcache is ours.flash_attn_with_kvcache
    torch.manual_seed(0)
    model = remote.Attention(16, 2)
    x, mask = torch.randn(2, 5, 16), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        found = model(x, mask)
        q, k, v = model.qkv(x).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        seen = torch.ones(5, 5, dtype=torch.bool).tril() & mask[:, None, None].bool()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        expected = model.out(out.transpose(1, 2).flatten(2))
    kept = mask.bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-5)


def test_what_there_is() -> None:
    with replace_flash_attn():
        import flash_attn
        import flash_attn.bert_padding
        import flash_attn.flash_attn_interface as interface
        import flash_attn.layers.rotary

        assert flash_attn.__version__ == "2.8.3"
        for part in ("", ".bert_padding", ".flash_attn_interface", ".layers", ".layers.rotary"):
            name = f"flash_attn{part}"
            found = importlib.util.find_spec(name)
            assert found is not None
            assert found.name == name
            assert sys.modules[name].__name__ == name
        functions = [name for name in ours.__all__ if name.startswith("flash_attn_")]
        assert len(functions) >= 7
        for name in functions:
            assert getattr(flash_attn, name) is getattr(interface, name) is getattr(ours, name)
        for name in ("index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"):
            assert getattr(flash_attn.bert_padding, name) is getattr(ours.bert_padding, name)
        assert flash_attn.layers.rotary.apply_rotary_emb is rotary.apply_rotary_emb
        assert flash_attn.layers.rotary.apply_rotary_emb_func is rotary.apply_rotary_emb
        with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.ops"):
            importlib.import_module("flash_attn.ops.rms_norm")
        with pytest.raises(ImportError, match="cannot import name 'flash_attn_unpadded_func'"):
            from flash_attn import flash_attn_unpadded_func  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.bert_padding")


def test_an_exception_ends_it() -> None:
    def fail() -> None:
        with replace_flash_attn():
            assert "flash_attn" in sys.modules
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert "flash_attn" not in sys.modules


def test_nested_contexts() -> None:
    with replace_flash_attn():
        outer = sys.modules["flash_attn"]
        for override in (False, True):
            with replace_flash_attn(override=override):
                assert sys.modules["flash_attn"] is outer
        assert sys.modules["flash_attn"] is outer


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A flash_attn that is installed and imported, with a part that ours does not have."""
    found, part = ModuleType("flash_attn"), ModuleType("flash_attn.ops")
    found.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", found)
    monkeypatch.setitem(sys.modules, "flash_attn.ops", part)
    return found


def test_an_installed_one_stays(real: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with replace_flash_attn():
        assert sys.modules["flash_attn"] is real
        with replace_flash_attn(override=True):
            assert sys.modules["flash_attn"] is not real
            assert "flash_attn.ops" not in sys.modules
        assert sys.modules["flash_attn"] is real
        assert "flash_attn.ops" in sys.modules
    assert sys.modules["flash_attn"] is real
    for name in ("flash_attn", "flash_attn.ops"):
        monkeypatch.delitem(sys.modules, name)


def test_backends_do_not_find_it(real: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of the flash_attn package would call this package's functions, which would choose it again."""
    for name in ("flash_attn", "flash_attn.ops"):
        monkeypatch.delitem(sys.modules, name)
    with replace_flash_attn():
        assert gpu.package("flash_attn") == "is not installed"
        assert gpu.package("flash_attn.cute", "flash_attn") == "is not installed"
    gpu.package.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    with replace_flash_attn(override=True):
        assert gpu.package("flash_attn") is real
    monkeypatch.delitem(sys.modules, "flash_attn")


def test_threads_that_overlap() -> None:
    """The first to enter leaves first: what was there comes back with the last."""
    inside, go = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with replace_flash_attn():
            inside.set()
            go.wait(10)
            seen.append("flash_attn" in sys.modules)

    with replace_flash_attn():
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    assert "flash_attn" in sys.modules
    go.set()
    thread.join(10)
    assert seen == [True]
    assert "flash_attn" not in sys.modules


@installed
def test_transformers_is_not_told_for_good() -> None:
    """It looks for an installed distribution, and remembers: the same before, in, and after the context."""
    checks = [
        import_utils.is_flash_attn_2_available,
        import_utils.is_flash_attn_3_available,
        lambda: import_utils.is_flash_attn_greater_or_equal("2.1.0"),
        lambda: "flash_attn" in import_utils._package_distribution_mapping(),
    ]
    for ask_inside in (False, True):
        import_utils.is_flash_attn_2_available.cache_clear()
        import_utils.is_flash_attn_greater_or_equal.cache_clear()
        with replace_flash_attn():
            assert not ask_inside or not any(check() for check in checks)
        assert not any(check() for check in checks)
    with replace_flash_attn():
        import_utils.is_flash_attn_greater_or_equal("2.1.0")
    assert import_utils.is_flash_attn_greater_or_equal.cache_info().currsize == 0


def test_code_that_asks_transformers_first() -> None:
    """What docs/attention.md tells to do about it."""
    code = (
        "from transformers.utils import is_flash_attn_2_available\n"
        "if is_flash_attn_2_available():\n    from flash_attn import flash_attn_func\n"
    )
    found: dict[str, Any] = {}
    with replace_flash_attn(), mock.patch("transformers.utils.is_flash_attn_2_available", return_value=True):
        exec(code, found)
    assert found["flash_attn_func"] is ours.flash_attn_func
    from transformers.utils import is_flash_attn_2_available

    assert is_flash_attn_2_available is import_utils.is_flash_attn_2_available


@installed
def test_a_model_of_transformers_loads_in_the_context(llava: Any) -> None:
    """flash_attention_2 is refused there as it is outside, and nothing of ours gets into transformers."""
    from transformers import modeling_flash_attention_utils as utils

    before = utils._flash_fn, utils._loaded_implementation
    with replace_flash_attn(), pytest.raises((ImportError, ValueError)):
        llava.set_attn_implementation("flash_attention_2")
    assert (utils._flash_fn, utils._loaded_implementation) == before
    llava.set_attn_implementation("sdpa")


def test_it_is_a_name_of_the_package() -> None:
    assert {"replace_flash_attn", "register_attention"} <= set(lightvlm.__all__) & set(dir(lightvlm))
