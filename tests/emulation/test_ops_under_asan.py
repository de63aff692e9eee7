"""Every op's emulated kernels once more, with every access checked: small cases, sizes around tiles, strides.

`pytest tests/ops -k emulated` in the same environment (docs/emulation.md) checks the rest, in half an hour.
"""

from __future__ import annotations

import subprocess
import sys

from tests.emulation.build import ROOT, asan_env, build

# By name: where an access may miss its tensor.
_TELLING = "test_small_cases or odd or stride or unaligned or tile or sizes"


def test_kernels_touch_only_their_tensors() -> None:
    environment = {
        **asan_env(),
        "LIGHTVLM_EMULATION_LIBRARY": str(build("asan")),
        "LIGHTVLM_EXAMPLES": "5",  # of each property test: the accesses, not the numerics, are at stake
    }
    command = [sys.executable, "-m", "pytest", "tests/ops", "-k", f"emulated and ({_TELLING})", "-q", "-x"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
