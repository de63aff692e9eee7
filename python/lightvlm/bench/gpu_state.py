"""Driver, clocks and temperature of a GPU: figures mean little without them."""

from __future__ import annotations

import subprocess

FIELDS = (
    "name",
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "temperature.gpu",
    "memory.used",
    "clocks_event_reasons.active",
)


def gpu_state(index: int = 0) -> dict[str, str] | None:
    """What nvidia-smi says of a GPU, field by field, or None where there is no nvidia-smi that answers."""
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    if not lines:
        return None
    return dict(zip(FIELDS, (value.strip() for value in lines[0].split(",")), strict=False))
