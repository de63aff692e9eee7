"""``append_attend_``: a decoding step on one cache, write included, against torch's write and attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightvlm_ext import ops

from ._case import Case, Geometry, Sizes, dtype_name, require_close

_CPU_TOKENS, _GPU_TOKENS = (1024, 8192), (1024, 8192, 32768)
_LARGEST_ON_CPU = 65536  # batch times tokens
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def cases(sizes: Sizes) -> Iterator[Case]:
    """One new token per row, caches (B, N, Hkv, D) as flash-attn has them."""
    on_cpu = sizes.device.type == "cpu"
    for tokens in sizes.tokens or (_CPU_TOKENS if on_cpu else _GPU_TOKENS):
        for model, geometry in sizes.geometries().items():
            for batch in sizes.batches:
                if on_cpu and batch * tokens > _LARGEST_ON_CPU:
                    continue
                for dtype in (torch.bfloat16, torch.float32) if on_cpu else (torch.bfloat16,):
                    yield _case(batch, tokens, model, geometry, dtype, sizes.device)


def _case(
    batch: int, tokens: int, model: str, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> Case:
    def numbers(rows: int, heads: int) -> Tensor:
        return torch.randn(batch, rows, heads, geometry.head_dim, dtype=dtype, device=device)

    query = numbers(1, geometry.heads)
    key, value = (numbers(tokens, geometry.kv_heads) for _ in range(2))
    new_key, new_value = (numbers(1, geometry.kv_heads) for _ in range(2))
    before = torch.full((batch,), tokens - 1, dtype=torch.int32, device=device)
    grouped = query.view(batch, geometry.kv_heads, -1, geometry.head_dim)
    heads_first = [x.transpose(1, 2) for x in (key, value)]

    def op() -> Tensor:
        return ops.append_attend_(query, key, value, new_key, new_value, before)[0]

    def write() -> None:
        key[:, tokens - 1 :], value[:, tokens - 1 :] = new_key, new_value

    def torch_attention(query: Tensor, **options: bool) -> Callable[[], Tensor]:
        def call() -> Tensor:
            write()
            return F.scaled_dot_product_attention(query, *heads_first, **options)  # type: ignore[arg-type]

        return call

    def verify() -> None:
        wanted = torch_attention(grouped)().view(query.shape)
        require_close(op(), wanted, _TOLERANCE[dtype])

    heads = f"{geometry.heads}/{geometry.kv_heads} heads of {geometry.head_dim}"
    return Case(
        f"{batch} x {tokens} tokens, {heads} {dtype_name(dtype)} ({model})",
        op,
        {
            "write, SDPA": torch_attention(query.transpose(1, 2), enable_gqa=True),
            "write, SDPA, group as queries": torch_attention(grouped),
        },
        verify,
        bytes=key.nbytes + value.nbytes,
        parameters={"model": model, "batch": batch, "tokens": tokens, "dtype": dtype_name(dtype)},
    )
