"""Device error words: how kernels report bad values without a synchronisation.

A CPU op raises at once. A CUDA kernel ignores the offending entry and sets a bit in a word that
lives on its device; nobody waits for it. `device_errors()` reads the words, and under
LIGHTVLM_CHECK=1 every op reads its own right away and raises.
"""

from __future__ import annotations

import os
import threading

import torch

from . import _library

_lock = threading.Lock()
# One word per device and op. They are never freed: CUDA graphs hold their addresses.
_words: dict[tuple[torch.device, str], torch.Tensor] = {}


def error_word(op: str, device: torch.device) -> torch.Tensor | None:
    """The word that `op` sets on `device`, int32 (1,); None where the op raises by itself."""
    if device.type != "cuda" and not _library.is_emulated():
        return None
    word = _words.get((device, op))
    if word is None:
        with _lock:
            word = _words.setdefault((device, op), torch.zeros(1, dtype=torch.int32, device=device))
    return word


def check_now(op: str, device: torch.device) -> None:
    """Under LIGHTVLM_CHECK=1, waits for the device and raises what `op` found there.

    Raises:
        ValueError: a value in a tensor was out of its range.
    """
    if os.environ.get("LIGHTVLM_CHECK") != "1":
        return
    word = _words.get((device, op))
    if word is not None:
        messages = _read(op, word)
        if messages:
            raise ValueError("; ".join(messages))


def device_errors(*, clear: bool = True) -> list[str]:
    """What kernels found wrong in the values of their tensors since the last call, per device.

    Synchronises with each device that ran an op. Empty where all was well, and for the CPU, whose
    ops raise at once.

    Args:
        clear: forget what is returned.
    """
    found = []
    for (device, op), word in list(_words.items()):
        for message in _read(op, word, clear=clear):
            found.append(f"{device}: {message}")
    return found


def _read(op: str, word: torch.Tensor, *, clear: bool = True) -> list[str]:
    bits = int(word.item())
    if clear and bits:
        word.zero_()
    return [f"{op}: {_library.describe_error(1 << b)}" for b in range(31) if bits >> b & 1]
