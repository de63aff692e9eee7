"""merge_tokens: each dropped token into the most similar kept one."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .. import _errors, _library
from .._merge_args import check_merge
from .._observe import observed
from .._types import Selection


@overload
def merge_tokens(
    x: torch.Tensor,
    selection: Selection,
    weight: torch.Tensor,
    group: torch.Tensor,
    *,
    metric: torch.Tensor | None = ...,
    align: str = ...,
    return_target: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def merge_tokens(
    x: torch.Tensor,
    selection: Selection,
    weight: torch.Tensor,
    group: torch.Tensor,
    *,
    metric: torch.Tensor | None = ...,
    align: str = ...,
    return_target: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


@observed
def merge_tokens(
    x: torch.Tensor,
    selection: Selection,
    weight: torch.Tensor,
    group: torch.Tensor,
    *,
    metric: torch.Tensor | None = None,
    align: str = "left",
    return_target: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Merges each token that is not kept into the most similar kept token of its group (LightVLM,
    arXiv 2509.00419).

        y_c = (w_c x_c + sum w_i x_i) / (w_c + sum w_i)    over the tokens i that go to c

    Similarity is the cosine of metric; ties go to the lower kept token. A zero vector, or one with NaN or
    infinity, has cosine 0 to all. Cosines are fp32 sums of products of the inputs as they are; where two kept
    tokens are within a few fp32 roundings of each other, backends may choose differently. Sums run in
    fp32, the kept token first and then in ascending token order: the same bits on every backend, for the
    same choices. A kept token at which nothing of positive weight arrives stays as it is, bit for bit, and so
    does one without a group. A token without a group, or whose group keeps nothing, vanishes.

    Args:
        x: (R, N, C) float32, float16 or bfloat16, any strides (a last dimension that is not contiguous
            costs a copy).
        selection: the kept tokens, as `select` gives them: index (R, M), ascending up to count, and count
            (R,). inverse is not read.
        weight: (R, N) float32, finite and >= 0.
        group: (R, N) int32: tokens merge only within a group (an image, say); negative: takes no part.
            Ids need not be dense.
        metric: (R, N, Cm) float32, float16 or bfloat16. Default: x.
        align: "left": row r's tokens stand in slots [0, count[r]); "right": in [M - count[r], M). The
            other slots are zeros.
        return_target: also return where each token went.

    Returns:
        (R, M, C) in x's dtype; with return_target also (R, N) int32: the position in index of the kept
        token that each token is now part of (its own for a kept one), or -1 where it vanished.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not fit, or align is neither. On the CPU also: an index below count
            lies outside [0, N) or is not above the one before, a count lies outside [0, M], or a weight is
            negative, infinite or NaN. On CUDA these set the device error word (`lightvlm_ext.device_errors`):
            the slot of such an index is zeros and its token is not kept; all slots of a row with
            such a count are zeros; such a weight is 0.
    """
    args = check_merge(x, selection, weight, group, metric=metric, align=align)
    _library.check_backend(x.device)
    index, count, _ = args.selection
    rows, tokens, width = x.shape
    slots = index.shape[1]
    out = torch.empty((rows, slots, width), dtype=x.dtype, device=x.device)
    target = torch.empty((rows, tokens), dtype=torch.int32, device=x.device) if return_target else None
    workspace = None
    if x.device.type == "cuda" or _library.is_emulated():
        words = rows * (3 * tokens + slots + (slots + 2) // 2)
        workspace = torch.empty((words,), dtype=torch.int64, device=x.device)
    _library.op("merge_tokens")(
        args.x,
        args.metric,
        index,
        count,
        args.weight,
        args.group,
        args.right,
        out,
        target,
        workspace,
        _errors.error_word("merge_tokens", x.device),
    )
    _errors.check_now("merge_tokens", x.device)
    return out if target is None else (out, target)


@_library.register_fake("merge_tokens")
def _merge_tokens_fake(
    x: torch.Tensor,
    metric: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    weight: torch.Tensor,
    group: torch.Tensor,
    right: bool,
    out: torch.Tensor,
    target: torch.Tensor | None,
    workspace: torch.Tensor | None,
    error: torch.Tensor | None,
) -> None:
    return None
