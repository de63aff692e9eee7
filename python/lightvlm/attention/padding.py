"""From padded batches to packed ones and back: what flash_attn.bert_padding offers."""

from __future__ import annotations

import torch
from torch import Tensor

from lightvlm_ext import _checks


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input (N, ...)[indices]: rows by number, (len(indices), ...)."""
    _checks.shape(_checks.tensor(indices, "indices"), "indices", ("n",))
    return _checks.tensor(input, "input").index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with values (len(indices), ...) in the rows of these numbers, 0 elsewhere."""
    rest = _checks.tensor(values, "values").shape[1:]
    _checks.shape(_checks.tensor(indices, "indices"), "indices", (values.shape[0],))
    _checks.integer(first_axis_dim, "first_axis_dim", 0)
    return values.new_zeros((first_axis_dim, *rest)).index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a mask names, one row after the other.

    hidden_states: (B, S, ...).   attention_mask: (B, S) bool or int, 1: a token.
    unused_mask: (B, S), 1: a token that is kept in the result and yet counts as padding.

    Returns what flash_attn.bert_padding.unpad_input (2.7 and later) does: the tokens (total, ...), where they stood in
    the batch's B * S places (total,), cu_seqlens (B + 1,) int32, the longest row, and how many tokens of attention_mask
    each row has (B,) int32.

    How many there are is read from the device, which waits for it: call it once per batch, not per layer.
    """
    shape = tuple(_checks.tensor(hidden_states, "hidden_states").shape[:2])
    _checks.shape(_checks.tensor(attention_mask, "attention_mask"), "attention_mask", shape)
    mask = attention_mask
    if unused_mask is not None:
        _checks.shape(_checks.tensor(unused_mask, "unused_mask"), "unused_mask", shape)
        mask = attention_mask.int() + unused_mask.int()
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    lengths = mask.sum(dim=-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(batch, seqlen, ...) with hidden_states (total, ...) at the places that unpad_input named, 0 elsewhere."""
    tokens = _checks.tensor(hidden_states, "hidden_states").shape[0]
    _checks.shape(_checks.tensor(indices, "indices"), "indices", (tokens,))
    places = _checks.integer(batch, "batch", 0) * _checks.integer(seqlen, "seqlen", 0)
    return index_put_first_axis(hidden_states, indices, places).unflatten(0, (batch, seqlen))
