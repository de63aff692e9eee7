"""``importance`` against what matmul, exp and softmax make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightvlm_ext import ops, reference

from ._case import DTYPES, Case, Sizes, dtype_name, require_close
from ._importance_torch import Problem, given_baselines, own_baselines

_CPU_TOKENS, _CPU_WINDOWS = (1000, 8192), (16, 64)
_GPU_TOKENS, _GPU_WINDOWS = (2048, 8192, 32768), (1, 16, 128)
_LOGITS = 4 << 30  # bytes of the baselines' logits, from which on a case is left out
_ALL_ROWS = 2048  # up to so many tokens also the column sums of every row


def cases(sizes: Sizes) -> Iterator[Case]:
    """Attention from the last W rows to every key, mean over rows and heads: with the log-sum-exp of the model's own
    attention, and with a softmax of its own. In 16 bit, and on a CPU in 32."""
    on_cpu = sizes.device.type == "cpu"
    for tokens in sizes.tokens or (_CPU_TOKENS if on_cpu else _GPU_TOKENS):
        for model, geometry in sizes.geometries().items():
            for batch in sizes.batches:
                for dtype in DTYPES if on_cpu else (torch.bfloat16,):
                    windows = [w for w in (_CPU_WINDOWS if on_cpu else _GPU_WINDOWS) if w < tokens]
                    windows += [tokens] if tokens <= _ALL_ROWS else []
                    for window in windows:
                        if 4 * batch * geometry.heads * window * tokens > _LOGITS:
                            continue
                        query = torch.randn(
                            batch, window, geometry.heads, geometry.head_dim, device=sizes.device
                        )
                        key = torch.randn(
                            batch, tokens, geometry.kv_heads, geometry.head_dim, device=sizes.device
                        )
                        problem = Problem(query.to(dtype), key.to(dtype))
                        yield _case(problem, model, given=True)
                        if window < tokens:
                            yield _case(problem, model, given=False)


def _case(problem: Problem, model: str, given: bool) -> Case:
    query, key = problem.query, problem.key
    batch, window, heads, width = query.shape
    tokens, kv_heads = key.shape[1:3]
    lse = problem.lse() if given else None
    baselines = given_baselines(problem, lse) if lse is not None else own_baselines(problem)

    def op() -> Tensor:
        return ops.importance(query, key, lse=lse)

    def verify() -> None:
        exact = _exactly(query, key, None if lse is None else lse.double())
        # Relative to what a key gets on average.
        require_close(op() * tokens, exact * tokens, 1e-3)
        for baseline in baselines.values():
            require_close(_as_tensor(baseline) * tokens, exact * tokens, 5e-2)

    pairs = window * tokens - window * (window - 1) // 2  # that are not hidden
    size = query.element_size()
    outputs = batch * tokens * (4 + 4)
    return Case(
        f"{'given' if given else 'own'} lse, {window} rows x {batch} x {tokens} keys, {heads}/{kv_heads} heads of "
        f"{width} {dtype_name(query.dtype)} ({model})",
        op,
        baselines,
        verify,
        bytes=size * (query.numel() + key.numel()) + outputs + (4 * lse.numel() if lse is not None else 0),
        flops=2 * batch * heads * width * pairs,
        precision=query.dtype,
        parameters={
            "model": model,
            "tokens": tokens,
            "batch": batch,
            "window": window,
            "lse": "given" if given else "own",
            "dtype": dtype_name(query.dtype),
        },
    )


def _as_tensor(baseline: Callable[[], object]) -> Tensor:
    result = baseline()
    assert isinstance(result, Tensor)
    return result


def _exactly(query: Tensor, key: Tensor, lse: Tensor | None) -> Tensor:
    """In float64, a batch row at a time: the reference makes the whole matrix."""
    rows = []
    for b in range(query.shape[0]):
        one = slice(b, b + 1)
        mine = None if lse is None else lse[one]
        row = reference.importance(query[one].double(), key[one].double(), lse=mine)
        assert isinstance(row, Tensor)
        rows.append(row)
    return torch.cat(rows)
