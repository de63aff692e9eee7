#!/usr/bin/env python3
"""Checks a wheel: the arches inside, what it needs, and that it imports and works away from the source tree.

    python scripts/check_release.py dist/lightvlm-*.whl --arches "80-real;90a-real;90-virtual"

Any torch will do, with or without CUDA. Prints what it found; exit status 1 and a line where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

# What the library may need at run time: torch, and what every C++ library needs.
NEEDED = re.compile(r"lib(torch|torch_cpu|c10|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so(\.\d+)?|ld-linux.*")

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, lightvlm_ext
from lightvlm_ext import _host, ops, reference
assert lightvlm_ext.__file__.startswith(sys.argv[1]), lightvlm_ext.__file__
torch.manual_seed(0)
scores = torch.rand(3, 1000)
found, wanted = ops.select(scores, keep=350), reference.select(scores, keep=350)
assert all(torch.equal(a, b) for a, b in zip(found, wanted)), "select disagrees with its reference"
key, value = torch.randn(2, 3, 1000, 2, 8)
kept = [t[torch.arange(3)[:, None], found.index.long()] for t in (key, value)]
ops.compact_kv_(key, value, found.index, found.count)
assert torch.equal(key[:, :350], kept[0]) and torch.equal(value[:, :350], kept[1]), "compact_kv_ is wrong"
assert lightvlm_ext.keep_counts(1000, [0.35]) == [350]
import lightvlm
print(json.dumps({**lightvlm_ext.build_info(), "host": _host.module_info(), "torch_here": torch.__version__}))
"""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"check_release: {message}")


def device_code(library: Path) -> set[str]:
    """What the library's fat binary holds: sm_80, compute_90 ... cuobjdump's list, or else the headers themselves."""
    if tool := shutil.which("cuobjdump"):
        found = set()
        for option in ("--list-elf", "--list-ptx"):
            text = subprocess.run([tool, option, str(library)], capture_output=True, text=True).stdout
            name = "sm" if option == "--list-elf" else "compute"
            found |= {f"{name}_{arch}" for arch in re.findall(r"\.sm_(\d+)[af]?\.", text)}
        return found
    return fat_binary(library.read_bytes())


def fat_binary(data: bytes) -> set[str]:
    """Walks the fat binaries (magic, version, header size, size) and their entries (kind, version, header size, size,
    ..., arch at 28; kind 1 is PTX, 2 machine code). The names carry no a or f, as the headers do not."""
    found, at = set(), data.find(b"\x50\xed\x55\xba")
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        entry, end = at + header, at + header + size
        while header == 16 and entry + 64 <= end <= len(data):
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            if kind not in (1, 2) or entry_header < 32:
                break
            found.add(f"{'compute' if kind == 1 else 'sm'}_{arch}")
            entry += entry_header + entry_size
        at = data.find(b"\x50\xed\x55\xba", at + 4)
    return found


def check(wheel: Path, arches: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder).resolve() / "target")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, str(wheel)]
        subprocess.run(install, check=True)
        library = Path(target) / "lightvlm_ext" / "_C.so"
        print(
            f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, _C.so {library.stat().st_size / 1e6:.1f} MB"
        )

        found = device_code(library)
        wanted = {
            ("compute_" if kind == "virtual" else "sm_") + re.sub("[af]$", "", name)
            for name, kind in (arch.split("-") for arch in arches)
        }
        print("device code:", *sorted(found))
        require(found == wanted, f"device code is {sorted(found)}, wanted {sorted(wanted)}")

        kernels = json.loads(library.with_suffix(".kernels.json").read_text())
        compiled = {f"sm_{arch.removesuffix('-real')}" for arch in arches if arch.endswith("-real")}
        print(f"kernels: {len(kernels)}, each for", *sorted(compiled))
        for name, by_arch in kernels.items():
            require(set(by_arch) == compiled, f"{name} is compiled for {sorted(by_arch)}")
            for arch, used in sorted(
                by_arch.items()
            ):  # slower there, not wrong: the budget refuses it on sm_80 and sm_90a
                if spilt := used["spill_stores"] + used["spill_loads"]:
                    print(f"spills {spilt} bytes on {arch}: {name}")

        listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing.stdout)
        print("needs:", *needed)
        require(all(NEEDED.fullmatch(name) for name in needed), f"needs {needed}")

        program = [sys.executable, "-c", PROGRAM, target]
        done = subprocess.run(program, capture_output=True, text=True, cwd=folder, env=None)
        require(done.returncode == 0, f"the installed wheel does not work:\n{done.stderr}")
        info = json.loads(done.stdout)
        print(f"works on torch {info['torch_here']}; built with torch {info['torch']}, nvcc {info['nvcc']}")
        require(info["cuda_arches"] == arches, f"build_info names {info['cuda_arches']}, wanted {arches}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks a built wheel.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--arches", required=True, help="as CMake names them, separated by semicolons")
    args = parser.parse_args()
    check(args.wheel.resolve(), args.arches.split(";"))


if __name__ == "__main__":
    main()
