"""The kernels' registers, spills, stack and static shared memory stay inside tests/ops/kernel_budget.json."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightvlm_ext
from lightvlm_ext import _library

ROOT = Path(__file__).resolve().parents[2]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


kernel_budget = script("scripts/kernel_budget.py")
kernel_resources = script("cmake/kernel_resources.py")


def test_kernels_stay_inside_their_budget() -> None:
    info = lightvlm_ext.build_info()
    if "cuda" not in info["backends"]:
        pytest.skip(f"no kernels to look at: {info['cuda_reason']}")
    kernels, nvcc = kernel_budget.load(_library.library_path())
    committed = json.loads(kernel_budget.BUDGET.read_text())
    findings = kernel_budget.compare(kernels, committed["kernels"], same_nvcc=nvcc == committed["nvcc"])
    table = "\n".join(str(finding) for finding in findings)
    assert not findings, f"\n{table}\nMeant so? python scripts/kernel_budget.py --update"


def test_the_budget_allows_no_spill_and_has_both_arches() -> None:
    committed = json.loads(kernel_budget.BUDGET.read_text())
    assert committed["kernels"]
    for arches in committed["kernels"].values():
        assert set(arches) == set(kernel_budget.ARCHES)
        for limits in arches.values():
            assert limits["spill_stores"] == limits["spill_loads"] == 0
            assert limits["registers"] % kernel_budget.REGISTER_STEP == 0


NOTES = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8lightvlm13select_kernelILi2ENS_6half_tEEEvPKfi' for 'sm_80'
ptxas info    : Function properties for _ZN8lightvlm13select_kernelILi2ENS_6half_tEEEvPKfi
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 41 registers, used 1 barriers, 8 bytes cumulative stack size, 1040 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function '_ZN8lightvlm13select_kernelILi2ENS_6half_tEEEvPKfi' for 'sm_90a'
ptxas info    : Function properties for _ZN8lightvlm13select_kernelILi2ENS_6half_tEEEvPKfi
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""


def test_notes_of_ptxas_are_read(tmp_path: Path) -> None:
    log = tmp_path / "select.cu.o.ptxas"
    log.write_text(NOTES)
    kernel_resources.collect(tmp_path / "kernels.json", [log])
    (arches,) = json.loads((tmp_path / "kernels.json").read_text()).values()
    assert arches["sm_80"] == {
        "registers": 41,
        "stack": 8,
        "shared": 1040,
        "spill_stores": 0,
        "spill_loads": 0,
    }
    assert arches["sm_90a"] == {
        "registers": 255,
        "stack": 0,
        "shared": 0,
        "spill_stores": 4,
        "spill_loads": 8,
    }


def test_names_are_short() -> None:
    mangled = ["_ZN8lightvlm13select_kernelILi2ENS_6half_tEEEvPKfi", "_ZN8lightvlm4fillEPf"]
    assert kernel_resources.short_names(mangled) == ["select_kernel<2, half_t>", "fill"]


def test_the_launcher_keeps_notes_and_passes_the_rest(tmp_path: Path) -> None:
    """A stand-in for nvcc: prints what its environment says, and exits as it says."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ncat >&2 <<"END"\n{NOTES}\nx.cu(3): warning: unused\nEND\nexit ${{STATUS:-0}}\n'
    )
    nvcc.chmod(0o755)
    launcher = [sys.executable, str(ROOT / "cmake" / "kernel_resources.py")]
    command = [*launcher, "compile", str(nvcc), "-c", "x.cu", "-o", str(tmp_path / "x.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == "x.cu(3): warning: unused"
    assert len(kernel_resources.parse((tmp_path / "x.o.ptxas").read_text())) == 2
    (tmp_path / "x.o.ptxas").unlink()
    done = subprocess.run(
        command, capture_output=True, text=True, env={"STATUS": "2", "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 2
    assert not (tmp_path / "x.o.ptxas").exists()


FITTING = {"registers": 40, "stack": 0, "shared": 16, "spill_stores": 0, "spill_loads": 0}
KERNELS = {kernel: {arch: dict(FITTING) for arch in ("sm_80", "sm_90a")} for kernel in ("a", "b<1>")}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("registers", 41, "registers 41, budget 40"),
        ("stack", 8, "stack 8, budget 0"),
        ("shared", 17, "shared 17, budget 16"),
        ("spill_stores", 4, "spill_stores 4, budget 0"),
        ("spill_loads", 4, "spill_loads 4, budget 0"),
    ],
)
def test_what_breaks_the_budget_is_found(name: str, value: int, message: str) -> None:
    budget = kernel_budget.budget_of(KERNELS)
    assert kernel_budget.compare(KERNELS, budget) == []
    grown = copy.deepcopy(KERNELS)
    grown["b<1>"]["sm_90a"][name] = value
    (finding,) = kernel_budget.compare(grown, budget)
    assert str(finding).split() == ["sm_90a", *message.split(), "b<1>"]
    # Another release of nvcc gives out registers and stack in its own way; spills it may not make.
    other = kernel_budget.compare(grown, budget, same_nvcc=False)
    assert bool(other) == (name not in ("registers", "stack"))


def test_new_and_missing_kernels_are_found() -> None:
    budget = kernel_budget.budget_of(KERNELS)
    (finding,) = {f.what for f in kernel_budget.compare({"a": KERNELS["a"]}, budget)}
    assert finding == "in the budget, not in the library"
    found = kernel_budget.compare({**KERNELS, "c": {"sm_80": {**FITTING, "spill_stores": 4}}}, budget)
    assert [f.what for f in found] == ["spills 4 + 0 bytes, no budget", "in the library, not in the budget"]
    # A build for one arch is compared on that one, and one for others not at all.
    assert kernel_budget.compare({k: {"sm_90a": FITTING} for k in KERNELS}, budget) == []
    assert kernel_budget.compare({"d": {"sm_120": FITTING}}, budget) == []


def test_registers_are_rounded_up_to_what_a_multiprocessor_gives_out() -> None:
    budget = kernel_budget.budget_of({"a": {"sm_80": {**FITTING, "registers": 33}, "sm_120": FITTING}})
    assert budget == {"a": {"sm_80": FITTING}}
