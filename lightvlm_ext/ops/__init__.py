"""Typed wrappers of the compiled ops. Each has a plain-torch twin in `lightvlm_ext.reference`."""

from __future__ import annotations

from .._types import Selection
from .select import select
from .select_diverse import select_diverse

__all__ = ["Selection", "select", "select_diverse"]
