"""What the tests of importance share: inputs, tiers, precisions."""

from __future__ import annotations

import pytest
import torch

from tests.ops.backends import BACKENDS, NATIVE

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
# Emulated, 16 bit takes the tensor cores.
each_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# Options under which results do not depend on padding, batch and threads, to the bit.
EXACT = [
    {},
    {"rows": "sum", "heads": "max"},
    {"rows": "max", "heads": "none"},
    {"axis": "query"},
    {"causal": False},
]


def vectors(
    batch: int, window: int, tokens: int, query_heads: int, key_heads: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, window, query_heads, width), torch.randn(batch, tokens, key_heads, width)
