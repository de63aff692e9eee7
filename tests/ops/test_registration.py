"""Every op is there in every tier, under one schema and one signature."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import lightvlm_ext
from lightvlm_ext import _library, ops, reference
from tests.emulation.build import Control
from tests.ops.backends import EMULATED, EMULATED_NAMESPACE, emulation_library, load_emulation

ROOT = Path(__file__).resolve().parents[2]
OPS = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "library.cpp").read_text())
WRAPPERS = sorted(set(ops.__all__) & set(reference.__all__) | {n for n in ops.__all__ if n.islower()})


def test_there_are_ops() -> None:
    assert "select" in OPS


@pytest.mark.parametrize("name", OPS)
def test_op_is_registered_everywhere(name: str) -> None:
    native = _library.op(name)
    load_emulation()
    emulated = getattr(getattr(torch.ops, EMULATED_NAMESPACE), name).default
    schema = str(native._schema)
    assert schema.removeprefix("lightvlm::") == str(emulated._schema).removeprefix("lightvlm_emulated::")
    # Kernels never allocate: an op returns nothing and writes to what it is given.
    assert schema.endswith("-> ()")
    assert "!)" in schema
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lightvlm::{name}", "CPU")
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"lightvlm::{name}", "CUDA")
    assert has_cuda == ("cuda" in lightvlm_ext.build_info()["backends"])
    assert name in _library.fakes()


def test_every_op_is_built() -> None:
    listed = re.findall(r"^\s+(\w+)/(\w+)\s*$", (ROOT / "cmake" / "sources.cmake").read_text(), re.M)
    assert sorted(op for _, op in listed) == sorted(OPS)
    for room, op in listed:
        for suffix in (".h", ".cuh", ".cu", "_cpu.cpp", "_op.cpp"):
            assert (ROOT / "csrc" / room / f"{op}{suffix}").exists()


def test_emulated_ops_run_the_kernels() -> None:
    load_emulation()
    control = Control(emulation_library())
    before = control.launch_count("select")
    EMULATED.select(torch.rand(1, 4), keep=2)
    assert control.launch_count("select") == before + 1


@pytest.mark.parametrize("name", WRAPPERS)
def test_reference_has_the_signature_of_the_op(name: str) -> None:
    wrapper, twin = getattr(ops, name), getattr(reference, name)
    assert wrapper.__name__ == twin.__name__ == name

    def shape(function: object) -> list[tuple[str, object, object]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(wrapper) == shape(twin)
    assert inspect.getdoc(wrapper)
    assert inspect.getdoc(twin)


def test_error_bits_have_texts() -> None:
    assert _library.describe_error(1).startswith("index:")
    assert _library.describe_error(0) == ""
    assert _library.describe_error(1 << 30) == ""


def test_keep_counts() -> None:
    assert lightvlm_ext.keep_counts(1000, [0.7047, 0.4966, 0.35]) == [705, 497, 350]
    # Halves go up, one token always stays, and no stage gives tokens back.
    assert lightvlm_ext.keep_counts(5, [0.5, 0.1, 0.9, 0.0]) == [3, 1, 1, 1]
    assert lightvlm_ext.keep_counts(0, [0.5]) == [0]
    assert lightvlm_ext.keep_counts(7, []) == []
    with pytest.raises(ValueError, match="total: got -1"):
        lightvlm_ext.keep_counts(-1, [0.5])
    with pytest.raises(ValueError, match=r"fractions\[1\]: got 1.5"):
        lightvlm_ext.keep_counts(3, [0.5, 1.5])


def test_a_library_without_the_op_is_named() -> None:
    with pytest.raises(ImportError, match=r"has no op lightvlm::no_such_op: .* rebuild it"):
        _library.op("no_such_op")


def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(ValueError, match="cpu or cuda"):
        _library.check_backend(torch.device("xpu"))
    if "cuda" not in lightvlm_ext.build_info()["backends"]:
        with pytest.raises(ValueError, match="no CUDA backend"):
            _library.check_backend(torch.device("cuda"))
