"""Whether this package's own ops are there."""

from __future__ import annotations

import torch

from lightvlm_ext import _library


def no_ops(device: torch.device) -> str | None:
    """Why they do not run on a device: the library is missing, or not built for it."""
    try:
        _library.load()
        _library.check_backend(device)
    except (ImportError, ValueError) as error:
        return str(error)
    return None
