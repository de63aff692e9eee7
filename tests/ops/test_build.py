"""The shared objects: what they need, what they offer, and how their build fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightvlm_ext
from lightvlm_ext import _library

ROOT = Path(__file__).resolve().parents[2]

# torch's C shims, and what every C++ library takes from the compiler's and the system's runtime.
TORCH_SYMBOL = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
RUNTIME_SYMBOL = re.compile(
    r"_Z(NS|NKS|NOS|S|TVNS|TIS|TISt|TVSt|NKRS|NRS)[taosid0-9]|_Z(na|nw|dl|da)|_ZTVN10__cxxabiv1|_ZTI|_ZGVN?St"
    r"|__cxa_|__gxx_personality|_Unwind_|__gmon_start__|_ITM_|__tls_get_addr|__dynamic_cast"
    r"|.*@+(GLIBC|GLIBCXX|CXXABI|GCC)_"
)


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def symbols(*flags: str) -> list[tuple[str, str]]:
    """(type, name) of dynamic symbols of the library."""
    listing = run("nm", "-D", *flags, str(_library.library_path()))
    assert listing.returncode == 0, listing.stderr
    return [tuple(line.split()[-2:]) for line in listing.stdout.splitlines()]


def test_needs_torch_and_no_cuda_runtime() -> None:
    listing = run("readelf", "-d", str(_library.library_path()))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing.stdout)
    # libtorch.so pulls in libtorch_cuda.so, where the weak stream shim lives.
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    allowed = r"lib(torch|torch_cpu|c10|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so(\.\d+)?|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


def test_undefined_symbols_are_stable_abi() -> None:
    undefined = symbols("--undefined-only")
    torch_symbols = [(kind, name) for kind, name in undefined if TORCH_SYMBOL.fullmatch(name)]
    others = [name for _, name in undefined if not TORCH_SYMBOL.fullmatch(name)]
    assert torch_symbols
    assert [name for name in others if not RUNTIME_SYMBOL.match(name)] == []
    weak = {name for kind, name in torch_symbols if kind.lower() in "wv"}
    assert weak <= {"aoti_torch_get_current_cuda_stream"}
    # Strong, it would keep the library from loading beside a CPU-only torch.
    strong = {name for kind, name in torch_symbols if kind == "U"}
    assert "aoti_torch_get_current_cuda_stream" not in strong


def test_exports_only_what_is_said() -> None:
    exported = {name for _, name in symbols("--defined-only")}
    assert exported == {"lightvlm_build_info", "lightvlm_describe_error"}


def test_build_info_and_versions_agree() -> None:
    info = lightvlm_ext.build_info()
    assert set(info) == {"version", "backends", "cuda_arches", "compiler", "nvcc", "torch", "cuda_reason"}
    from lightvlm_ext import _host

    assert info["version"] == lightvlm_ext.__version__ == _host.module_info()["version"]
    assert info["backends"][0] == "cpu"
    has_cuda = "cuda" in info["backends"]
    assert bool(info["cuda_arches"]) == bool(info["nvcc"]) == has_cuda
    assert bool(info["cuda_reason"]) != has_cuda


def test_import_is_cheap_and_needs_no_library() -> None:
    code = (
        "import sys, lightvlm_ext\n"
        "assert 'torch' not in sys.modules\n"
        "from lightvlm_ext import ops, reference\n"
        "import torch\n"
        "assert not lightvlm_ext.is_available()\n"
        "assert reference.select(torch.rand(1, 4), keep=2).count.tolist() == [2]\n"
        "try:\n"
        "    ops.select(torch.rand(1, 4), keep=2)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    env = {**os.environ, "LIGHTVLM_LIBRARY": "/nonexistent/_C.so", "PYTHONPATH": str(ROOT)}
    done = run(sys.executable, "-c", code, env=env)
    assert done.returncode == 0, done.stderr
    assert "/nonexistent/_C.so" in done.stdout
    assert "pip install" in done.stdout


LEVELS_CODE = """
import hashlib, torch
from lightvlm_ext import ops
torch.manual_seed(0)
scores, features = torch.randn(3, 500).softmax(1), torch.randn(3, 500, 40)
flags = torch.rand(3, 500) < 0.1
found = [
    ops.select(scores, forced=flags, candidates=~flags, keep=100),
    ops.select(scores, forced=flags, candidates=~flags, mass=0.7),
    ops.select_diverse(scores, features, keep=100),
    ops.select_diverse(scores, features.bfloat16(), keep=100, strength=0.5),
]
print(hashlib.sha256(b"".join(t.numpy().tobytes() for s in found for t in s)).hexdigest())
"""


def test_every_cpu_level_gives_the_same_bits() -> None:
    digests = set()
    for level in ("portable", "avx2", "avx512"):
        env = {**os.environ, "LIGHTVLM_CPU_LEVEL": level, "PYTHONPATH": str(ROOT)}
        done = run(sys.executable, "-c", LEVELS_CODE, env=env)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def configure(build: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *options]
    return run(*command, env={**os.environ, **variables})


def test_cuda_on_without_nvcc_is_an_error(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DLIGHTVLM_CUDA=on", "-DCMAKE_CUDA_COMPILER=/nonexistent/nvcc")
    assert done.returncode != 0
    assert "LIGHTVLM_CUDA=on, but no nvcc was found" in " ".join(done.stderr.split())


def test_cuda_auto_without_nvcc_says_why(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DLIGHTVLM_CUDA=auto", "-DCMAKE_CUDA_COMPILER=/nonexistent/nvcc")
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "generated" / "build_config.h").read_text()
    assert '"backends": ["cpu"]' in config
    assert '"cuda_reason": "no nvcc was found' in config


def test_cuda_takes_no_other_word(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DLIGHTVLM_CUDA=maybe")
    assert done.returncode != 0
    assert "got 'maybe', must be auto, on or off" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("text", "arches"),
    [
        ("8.0;9.0a+PTX", "80-real;90a-real;90-virtual"),
        ("8.6 9.0", "86-real;90-real"),
        ("10.0a, 12.0+PTX", "100a-real;120-real;120-virtual"),
        ("Hopper", None),
    ],
)
def test_torch_arch_list(tmp_path: Path, text: str, arches: str | None) -> None:
    script = tmp_path / "arches.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/arches.cmake")\n'
        f'lightvlm_arches_from_torch_list("{text}" found)\nmessage("${{found}}")\n'
    )
    done = run("cmake", "-P", str(script))
    if arches is None:
        assert done.returncode != 0
        assert "cannot read 'Hopper'" in done.stderr
    else:
        assert done.stderr.strip() == arches
