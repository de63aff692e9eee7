"""The style checks that a commit has to pass."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = [
    str(path.relative_to(ROOT))
    for folder in ("csrc", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".h", ".cuh", ".cu", ".cpp"}
]


def tool(name: str) -> str:
    """A tool of the environment that runs the tests, or else of PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: pip install -e .[dev]"
    return found


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["clang-format", "--dry-run", "-Werror", *NATIVE],
    ],
    ids=["ruff-check", "ruff-format", "mypy", "clang-format"],
)
def test_style(command: list[str]) -> None:
    done = subprocess.run([tool(command[0]), *command[1:]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
