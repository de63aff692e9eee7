"""importance: how much attention each key gets from a few probe rows."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .. import _errors, _library
from .._importance_args import ImportanceArgs, check_importance
from .._observe import observed

# As in csrc/importance/importance.h, which checks the size of the workspace.
_PART = 128
_TARGET_SPLIT = 512
_TARGET_TILE = 128
_ALL_HEADS_TILES = 264
_JOINED_SPLITS = 16
# Words after which the parts of an own softmax take turns.
_PART_WORDS = 4 << 20


@overload
def importance(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    lse: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    row_pos: torch.Tensor | None = ...,
    lens: torch.Tensor | None = ...,
    leftpad: torch.Tensor | None = ...,
    rows: str = ...,
    heads: str = ...,
    axis: str = ...,
    return_visible: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def importance(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    lse: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    row_pos: torch.Tensor | None = ...,
    lens: torch.Tensor | None = ...,
    leftpad: torch.Tensor | None = ...,
    rows: str = ...,
    heads: str = ...,
    axis: str = ...,
    return_visible: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


@observed
def importance(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    lse: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    row_pos: torch.Tensor | None = None,
    lens: torch.Tensor | None = None,
    leftpad: torch.Tensor | None = None,
    rows: str = "mean",
    heads: str = "mean",
    axis: str = "key",
    return_visible: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scores each key by the attention that W probe rows give it, without an attention matrix.

    p[b, h, w, j] = exp(scale * <query[b, w, h], key[b, j, h // (Hq // Hkv)]> - lse[b, h, w]) where row w sees
    key j, else 0; then reduced over the rows of each head, and over the heads. Computed and summed in fp32, in
    an order that depends neither on padding, nor on the rest of the batch, nor on threads.

    Args:
        query: (B, W, Hq, D) fp32, fp16 or bf16: the probe rows, after rotary embedding. D is 1 to 256.
        key: (B, N, Hkv, D), same dtype, Hq a multiple of Hkv. Both with any strides and a contiguous last
            dimension, so (B, H, N, D) comes as a transposed view.
        lse: (B, Hq, W) fp32: log-sum-exp of each row's logits (natural logarithm, as FlashAttention returns
            it), used as it is; -inf means that the row saw nothing. Default: computed over the visible keys.
        scale: of the logits. Default: D ** -0.5.
        causal: row w sees the keys at positions <= row_pos[b, w] in [leftpad, lens); otherwise all in there.
        row_pos: (B, W) int32: the key position at which each probe row stands; negative: ignore the row.
            Default: lens[b] - W + w, the bottom right corner, as in FlashAttention. A row before leftpad is
            ignored, causal or not: where there are more rows than keys, give row_pos.
        lens: (B,) int32: where each batch row's keys end. Default: N.
        leftpad: (B,) int32: where they begin. Default: 0. Keys outside get 0, and their content is not looked
            at.
        rows: "sum", "mean" or "max" over the rows, for each query head. "mean" divides by the number of rows
            that see the key; 0 where none does.
        heads: "mean", "sum" or "max" over the query heads, or "none": mean within each key head's group.
        axis: "key", or "query": each visible logit is normalised over the rows instead of over the keys, and
            the result is for each row: the sum over keys and heads (LightKV's prompt guidance). rows and
            heads play no part then, and lse must be None.
        return_visible: also return how many rows see each key.

    Returns:
        score: fp32, (B, N); (B, Hkv, N) for heads="none"; (B, W) for axis="query".
        visible (only if asked for): (B, N) int32.

    A NaN or infinity in query, key or lse reaches only what depends on it, never another batch row. There is no
    NaN otherwise, as long as the logits are finite in fp32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, stride, device or choice does not fit. On the CPU also: 0 <= leftpad <= lens <= N
            does not hold. On CUDA that sets the device error word (`lightvlm_ext.device_errors`), and the
            batch row's scores are 0.
    """
    args = check_importance(
        query,
        key,
        lse=lse,
        scale=scale,
        causal=causal,
        row_pos=row_pos,
        lens=lens,
        leftpad=leftpad,
        rows=rows,
        heads=heads,
        axis=axis,
    )
    _library.check_backend(query.device)
    batch, window = query.shape[:2]
    tokens, key_heads = key.shape[1:3]
    shape: tuple[int, ...] = (batch, tokens)
    if axis == "query":
        shape = (batch, window)
    elif heads == "none":
        shape = (batch, key_heads, tokens)
    score = torch.empty(shape, dtype=torch.float32, device=query.device)
    visible = torch.empty((batch, tokens), dtype=torch.int32, device=query.device)
    _library.op("importance")(
        args.query,
        args.key,
        args.lse,
        args.scale,
        args.causal,
        args.row_pos,
        args.lens,
        args.leftpad,
        args.rows,
        args.heads,
        args.axis,
        score,
        visible,
        _workspace(args),
        _errors.error_word("importance", query.device),
    )
    _errors.check_now("importance", query.device)
    return (score, visible) if return_visible else score


def _workspace(args: ImportanceArgs) -> torch.Tensor | None:
    """What the CUDA kernels keep between launches; docs/kernels/importance.md. The CPU needs none."""
    device = args.query.device
    if device.type == "cpu" and not _library.is_emulated():
        return None
    batch, window, query_heads, _ = args.query.shape
    tokens, key_heads = args.key.shape[1:3]
    if args.axis == "key":
        targets, slots, probes = tokens, key_heads, query_heads // key_heads * window
    else:
        targets, slots, probes = window, query_heads, tokens
    words = 0
    if args.row_pos is not None and window > 0:
        words += batch * (2 * window + 1)
    on_tensor_cores = args.query.dtype != torch.float32 and args.axis == "key"
    tiles = batch * -(-tokens // _TARGET_TILE)
    if not on_tensor_cores or (key_heads > 1 and args.heads != "none" and tiles < _ALL_HEADS_TILES):
        words += batch * key_heads * targets
    if args.lse is None:
        parts = -(-probes // _PART)
        splits = -(-targets // _TARGET_SPLIT)
        part_words = 2 * batch * slots * _PART * splits
        if on_tensor_cores and probes <= 2 * _PART and splits <= _JOINED_SPLITS:
            words += parts * part_words
        else:
            words += 2 * batch * slots * probes
            words += min(parts * part_words, max(part_words, _PART_WORDS))
    return torch.empty(words, dtype=torch.int32, device=device)


@_library.register_fake("importance")
def _importance_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    causal: bool,
    row_pos: torch.Tensor | None,
    lens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    rows: str,
    heads: str,
    axis: str,
    score: torch.Tensor,
    visible: torch.Tensor,
    workspace: torch.Tensor | None,
    error: torch.Tensor | None,
) -> None:
    return None
