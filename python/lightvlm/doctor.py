"""``lightvlm doctor``: what is built, found and usable here, and what is missing and how to get it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import re
from typing import Any

_ATTENTION = {
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "flashinfer": "flashinfer-python",
}
"""Module -> distribution of the attention packages that are used, or compared with, where they are there."""
_DEMO = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``lightvlm doctor`` has no options of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Look around; nothing is changed and no model is loaded. What is missing is not an error."""
    import torch

    from . import __version__
    from .attention import backends as attention_backends
    from .methods import method_names
    from .models import supported_classes
    from .processing import COMPOSED

    problems: list[str] = []
    backends = _backends(problems)
    packages = {name: _version(name, name) for name in ("transformers", "torchvision")}
    if packages["torchvision"] is None:
        problems.append(
            f"torchvision is missing: processors of {', '.join(COMPOSED)} are composed from their image processor and "
            "tokenizer (images only, no video); to get it: pip install the torchvision that fits your torch"
        )
    for module, distribution in _DEMO.items():
        packages[distribution] = _version(module, distribution)
        if packages[distribution] is None:
            problems.append(
                f"{distribution} is missing, which lightvlm demo needs: pip install 'lightvlm[demo]'"
            )
    return {
        "version": __version__,
        "torch": torch.__version__,
        "packages": packages,
        "backends": backends,
        "attention": {"sdpa": True, **{name: _version(name, wheel) for name, wheel in _ATTENTION.items()}},
        "attention_backends": [dataclasses.asdict(backend) for backend in attention_backends()],
        "methods": method_names(),
        "models": supported_classes(),
        "reference_vlm": _reference(problems),
        "problems": problems,
    }


def _backends(problems: list[str]) -> dict[str, Any]:
    """What the compiled ops were built for, and on which devices of this machine they run."""
    import torch

    import lightvlm_ext

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        info = lightvlm_ext.build_info()
    except ImportError as error:
        problems.append(str(error))
        missing = {"built": False, "usable": False}
        return {"cpu": missing, "cuda": {**missing, "arches": [], "gpus": gpus}}
    built, arches, reason = info.pop("backends"), info.pop("cuda_arches"), info.pop("cuda_reason")
    cpu = {"built": "cpu" in built, "usable": _runs("cpu", problems)}
    cuda = {"built": "cuda" in built, "usable": False, "arches": arches, "gpus": gpus}
    if not cuda["built"]:
        problems.append(
            f"the ops are built without CUDA ({reason}): they run on the CPU only; with the CUDA toolkit: "
            "LIGHTVLM_CUDA=on pip install --no-build-isolation ."
        )
    elif not gpus:
        why = "torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU"
        problems.append(f"the ops are built for CUDA, but {why}: they run on the CPU")
    elif not covers(arches, torch.cuda.get_device_capability()):
        wanted = ".".join(map(str, torch.cuda.get_device_capability()))
        problems.append(
            f"the ops are built for {' '.join(arches)}, but {gpus[0]} has compute capability {wanted}: "
            f"rebuild with TORCH_CUDA_ARCH_LIST={wanted}"
        )
    else:
        cuda["usable"] = _runs("cuda", problems)
    return {"cpu": cpu, "cuda": cuda, **info}


def _runs(device: str, problems: list[str]) -> bool:
    """Whether an op gives the right answer on the device."""
    import torch

    from lightvlm_ext import ops

    try:
        index = ops.select(torch.tensor([[1.0, 3.0, 2.0]], device=device), keep=2).index.tolist()
    except (RuntimeError, ValueError) as error:
        problems.append(f"the ops do not run on {device}: {str(error).splitlines()[0]}")
        return False
    if index != [[1, 2]]:
        problems.append(f"the ops give wrong answers on {device}: select gave {index} for [[1, 2]]")
    return index == [[1, 2]]


def covers(arches: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these arches, as CMake names them, runs on a GPU of that compute capability.

    Machine code ("80-real") runs on its own major version from its minor on, "90a" on nothing but 9.0; PTX
    ("80-virtual") on anything as new; "80" is both.
    """
    for number, special, kind in re.findall(r"(\d+)([af]?)(?:-(real|virtual))?", " ".join(arches)):
        built = int(number[:-1]), int(number[-1])
        same_major = built[0] == capability[0] and built <= capability
        machine_code = kind != "virtual" and (built == capability if special else same_major)
        ptx = kind != "real" and not special and built <= capability
        if machine_code or ptx:
            return True
    return False


def _version(module: str, distribution: str) -> str | None:
    """Version of an installed package, found without importing it."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _reference(problems: list[str]) -> str | None:
    from .reference_vlm import path

    try:
        return str(path())
    except FileNotFoundError as error:
        problems.append(str(error))
        return None


def show(result: dict[str, Any]) -> None:
    """Print what was found, then the problems."""
    rows = [("lightvlm", result["version"]), ("torch", result["torch"])]
    rows += [(name, version or "not found") for name, version in result["packages"].items()]
    for name, value in result["backends"].items():
        if isinstance(value, dict):
            words = [("" if value[state] else "not ") + state for state in ("built", "usable")]
            words += [*value.get("arches", []), *value.get("gpus", [])]
            value = ", ".join(words)
        rows.append((f"ops: {name}", value or "-"))
    for name, version in result["attention"].items():
        rows.append((f"attention: {name}", "yes" if version is True else version or "not found"))
    for backend in result["attention_backends"]:
        rows.append((f"attention backend: {backend['name']}", backend["missing"] or "usable"))
    rows.append(("methods", ", ".join(result["methods"])))
    rows.append(("models", ", ".join(result["models"])))
    rows.append(("reference VLM", result["reference_vlm"] or "not found"))
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))
    print("\nno problems" if not result["problems"] else "\nproblems")
    for problem in result["problems"]:
        print(f"- {problem}")
