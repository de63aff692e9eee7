#!/usr/bin/env python3
"""Registers, spills, stack and static shared memory of every kernel against the committed budget.

    python scripts/kernel_budget.py                 # a table of what is over budget, new or gone; exit status 1 if any
    python scripts/kernel_budget.py --update        # commits to what the built library has
    python scripts/kernel_budget.py --library build/dev/_C.so

The build writes what ptxas said beside the library (cmake/kernel_resources.py). The budget,
tests/ops/kernel_budget.json, holds maxima for the arches that every build has. Registers are rounded up to 8, the
step in which a multiprocessor gives them out. Nothing may spill. Other releases of nvcc allocate differently: with
another than the budget's, registers and stack are not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = ROOT / "tests" / "ops" / "kernel_budget.json"
ARCHES = ("sm_80", "sm_90a")
REGISTER_STEP = 8
# What else is compared, and whether it depends on the release of nvcc.
LIMITS = {"registers": True, "stack": True, "shared": False, "spill_stores": False, "spill_loads": False}

Kernels = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    kernel: str
    arch: str
    what: str

    def __str__(self) -> str:
        return f"{self.arch:8} {self.what:44} {self.kernel}"


def budget_of(kernels: Kernels) -> Kernels:
    """The maxima that today's kernels fit into."""
    budget: Kernels = {}
    for kernel, arches in kernels.items():
        for arch, resources in arches.items():
            if arch not in ARCHES:
                continue
            registers = -(-resources["registers"] // REGISTER_STEP) * REGISTER_STEP
            limits = {"registers": registers, "stack": resources["stack"], "shared": resources["shared"]}
            budget.setdefault(kernel, {})[arch] = {**limits, "spill_stores": 0, "spill_loads": 0}
    return budget


def compare(kernels: Kernels, budget: Kernels, *, same_nvcc: bool = True) -> list[Finding]:
    """Everything that breaks the budget; kernels are compared on the arches that were built."""
    built = {arch for arches in kernels.values() for arch in arches} & set(ARCHES)
    findings = []
    for kernel, arches in budget.items():
        for arch in sorted(built & set(arches)):
            found = kernels.get(kernel, {}).get(arch)
            if found is None:
                findings.append(Finding(kernel, arch, "in the budget, not in the library"))
                continue
            for name, by_release in LIMITS.items():
                if found[name] > arches[arch][name] and (same_nvcc or not by_release):
                    findings.append(
                        Finding(kernel, arch, f"{name} {found[name]}, budget {arches[arch][name]}")
                    )
    for kernel, arches in kernels.items():
        for arch in sorted(built & set(arches) - set(budget.get(kernel, {}))):
            resources = arches[arch]
            if resources["spill_stores"] or resources["spill_loads"]:
                spills = f"{resources['spill_stores']} + {resources['spill_loads']} bytes"
                findings.append(Finding(kernel, arch, f"spills {spills}, no budget"))
            findings.append(Finding(kernel, arch, "in the library, not in the budget"))
    return findings


def release(nvcc: str) -> str:
    """13.0 for 13.0.48."""
    return ".".join(nvcc.split(".")[:2])


def load(library: Path) -> tuple[Kernels, str]:
    """(kernels, nvcc's release) of a library that was built with CUDA."""
    sys.path.insert(0, str(ROOT))
    from lightvlm_ext import _library

    _library.load(library)
    info: dict[str, Any] = _library.build_info()
    if "cuda" not in info["backends"]:
        raise SystemExit(f"{library}: has no CUDA backend: {info['cuda_reason']}")
    notes = library.with_suffix(".kernels.json")
    if not notes.exists():
        raise SystemExit(f"{notes}: is missing; it is written when the library is built: rebuild it")
    return json.loads(notes.read_text()), release(info["nvcc"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares the built kernels with their committed budget.")
    parser.add_argument("--update", action="store_true", help="commit to what the built library has")
    parser.add_argument("--library", type=Path, default=None, help="default: the one that lightvlm_ext loads")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from lightvlm_ext import _library

    kernels, nvcc = load((args.library or _library.library_path()).resolve())
    if args.update:
        spilling = [k for k, arches in kernels.items() if any(r["spill_stores"] for r in arches.values())]
        if spilling:
            print("these spill, which no budget allows:", *spilling, sep="\n  ", file=sys.stderr)
            return 1
        budget = {"nvcc": nvcc, "kernels": budget_of(kernels)}
        BUDGET.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
        print(f"{BUDGET.relative_to(ROOT)}: {len(budget['kernels'])} kernels")
        return 0
    committed = json.loads(BUDGET.read_text())
    findings = compare(kernels, committed["kernels"], same_nvcc=nvcc == committed["nvcc"])
    for finding in findings:
        print(finding)
    if findings:
        print("Meant so? python scripts/kernel_budget.py --update")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
