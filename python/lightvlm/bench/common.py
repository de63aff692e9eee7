"""What every benchmark says of where it ran."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def commit() -> str:
    """Commit of the source tree this package runs from, with "-dirty" if it was changed; "unknown" outside
    one."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip() or "unknown"


def device_name(device: str) -> str:
    """Model of the processor or GPU, with the number of threads on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def describe(device: str) -> dict[str, Any]:
    """device, torch, transformers and commit of a result."""
    import transformers

    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
