"""The op tests' emulated tier once more, with every access of every kernel checked."""

from __future__ import annotations

import subprocess
import sys

from tests.emulation.build import ROOT, asan_env, build


def test_kernels_touch_only_their_tensors() -> None:
    environment = {
        **asan_env(),
        "LIGHTVLM_EMULATION_LIBRARY": str(build("asan")),
        "LIGHTVLM_EXAMPLES": "5",  # of each property test: the accesses, not the numerics, are at stake
    }
    command = [sys.executable, "-m", "pytest", "tests/ops", "-k", "emulated", "-q", "-x"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
