"""The CPU twin of decode_attention reads rows, and lists of rows, to their ends and no further: AddressSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("portable", "avx2", "avx512_bf16")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None, "the library is built with a C++ compiler, so there is one"
    program = tmp_path_factory.mktemp("rows") / "decode_rows"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=address", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    source = Path(__file__).with_name("decode_rows.cpp")
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("level", LEVELS)
def test_rows_end_where_they_end(program: Path, level: str) -> None:
    """Every head_dim, 1 to 8 heads, spans around tiles, strided and in pages, each format."""
    environment = {**os.environ, "LIGHTVLM_CPU_LEVEL": level, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout) > 0
