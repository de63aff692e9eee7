"""Importance of every key, from a few rows of a call and the log-sum-exp that its backend returned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call
from .logits import row_logits
from .native import no_ops
from .spans import capacity_of

_TILE_NUMBERS = 1 << 21
"""Logits that the path in plain torch holds at a time."""


class Rows(NamedTuple):
    """Probe rows of a batch, as the importance op takes them.

    query: (B, W, Hq, D).   lse: (B, Hq, W).   positions: (B, W) int32, where they stand in _keys().
    exists: (B, W) bool, which rows there are, or None: all.
    begins, ends: (B,) int32, of each sequence in keys(), or None: all of it.
    """

    query: Tensor
    lse: Tensor
    positions: Tensor
    exists: Tensor | None
    begins: Tensor | None
    ends: Tensor | None


def importance(call: Call, lse: Tensor, last: int, rows: Tensor | None) -> Tensor:
    """fp32 importance of every key: (B, Sk), (B, capacity) of a cache, (total_k,) packed, and with a block table
    (B, max_blocks * page_size). Keys that no probe row sees, and those outside their sequence, have 0.

    p = exp(logit - lse) for each probe row, mean over the rows that see the key (for each head), then over the query
    heads. ``lightvlm_ext.ops.importance`` computes it where the logits are scaled products alone; with a window,
    softcap or ALiBi, or where the ops are not built, plain torch does, W rows times the keys at a time at most.

    lse: as the call returned it.   last: the last so many rows of each sequence, where rows is None.
    rows: (W,) or (B, W), which query rows of each sequence; negative: from its end. In a packed call a row that a
    sequence does not have is ignored.
    """
    shared = call.packed and call.block_table is None  # all sequences lie in one row of keys
    if call.batch == 0 or call.query.numel() == 0 or call.key.numel() == 0:
        shape = (call.key.shape[0],) if shared else (call.batch, capacity_of(call))
        return torch.zeros(shape, dtype=torch.float32, device=call.query.device)
    probes = _probe_rows(call, lse, last, rows)
    key = _keys(call)
    shaped = call.windowed or call.softcap > 0 or call.alibi is not None
    if shaped or no_ops(call.query.device) is not None:
        found = torch.stack([_plain(call, probes, key, row) for row in range(call.batch)])
    else:
        found = _native(call, probes, key)
    # Every key belongs to one sequence and is 0 in all others.
    return found.sum(dim=0) if shared else found


def _native(call: Call, probes: Rows, key: Tensor) -> Tensor:
    from lightvlm_ext import ops

    return ops.importance(
        probes.query,
        key if key.stride(-1) == 1 else key.contiguous(),
        lse=probes.lse,
        scale=call.scale,
        causal=call.causal,
        row_pos=probes.positions if probes.exists is None else probes.positions.where(probes.exists, -1),
        lens=probes.ends,
        leftpad=probes.begins,
    )


def _plain(call: Call, probes: Rows, key: Tensor, row: int) -> Tensor:
    """(N,) of one sequence."""
    begin: int | Tensor = 0 if probes.begins is None else probes.begins[row]
    end: int | Tensor = key.shape[1] if probes.ends is None else probes.ends[row]
    total = torch.zeros(key.shape[1], dtype=torch.float32, device=key.device)
    within = slice(None)
    if key.device.type == "cpu":  # lengths can be read, and what is outside be left alone
        begin, end = int(begin), int(end)
        within = slice(begin, end)
    columns = torch.arange(key.shape[1], device=key.device)[within]
    keys = key[row, within].float().transpose(0, 1)
    query, lse, positions = probes.query[row], probes.lse[row], probes.positions[row]
    exists = None if probes.exists is None else probes.exists[row]
    sums = torch.zeros_like(columns, dtype=torch.float32)
    seen = torch.zeros_like(columns)
    tile = max(1, _TILE_NUMBERS // max(1, query.shape[1] * columns.shape[0]))
    for start in range(0, query.shape[0], tile):
        rows = slice(start, start + tile)
        logits = row_logits(query[rows], keys, positions[rows], columns, begin, end, call.slopes(row), call)
        if exists is not None:
            logits = logits.masked_fill(~exists[rows, None], -torch.inf)
        of_rows = lse[:, rows, None]
        weights = torch.exp(logits - of_rows.masked_fill(of_rows == -torch.inf, 0.0))
        sums += weights.sum(dim=1).mean(dim=0)
        seen += (logits[0] > -torch.inf).sum(dim=0)
    total[within] = sums / seen.clamp(min=1)
    return total


def _keys(call: Call) -> Tensor:
    """(B, N, Hkv, D): a view, but for pages and for rows of a cache that are named by index."""
    if call.block_table is not None:
        pages = call.key.index_select(0, call.block_table.clamp(0, call.key.shape[0] - 1).flatten())
        return pages.view(call.batch, -1, *call.key.shape[2:])
    if call.packed:
        return call.key.expand(call.batch, *call.key.shape)
    if call.batch_idx is not None:
        return call.key.index_select(0, call.batch_idx)
    return call.key[: call.batch]


def _probe_rows(call: Call, lse: Tensor, last: int, rows: Tensor | None) -> Rows:
    begins, ends = _bounds(call)
    if call.packed:
        return _packed_rows(call, lse, last, rows, begins, ends)
    length = call.query.shape[1]
    if rows is None:
        first = max(0, length - last)
        query, lse = call.query[:, first:], lse[:, :, first:]
        index = torch.arange(first, length, device=call.query.device)[None]
    else:
        index = torch.where(rows < 0, rows + length, rows).long()
        if index.dim() == 1:
            query, lse, index = call.query[:, index], lse[:, :, index], index[None]
        else:
            at = index[:, :, None, None].expand(-1, -1, *call.query.shape[2:])
            query = call.query.gather(1, at)
            lse = lse.gather(2, index[:, None].expand(-1, lse.shape[1], -1))
    query = query if query.stride(-1) == 1 else query.contiguous()
    end = capacity_of(call) if ends is None else ends[:, None]
    positions = _positions(call, index, length, end)
    return Rows(query, lse, positions.expand(call.batch, -1).int().contiguous(), None, begins, ends)


def _packed_rows(
    call: Call, lse: Tensor, last: int, rows: Tensor | None, begins: Tensor | None, ends: Tensor | None
) -> Rows:
    assert call.cu_q is not None
    assert ends is not None
    first = call.cu_q[:-1, None]
    lengths = call.cu_q[1:, None] - first
    if rows is None:
        width = max(1, min(last, call.max_q))
        index = lengths - width + torch.arange(width, device=call.query.device)
    else:
        index = torch.where(rows < 0, rows + lengths, rows)
    exists = (index >= 0) & (index < lengths)
    at = (first + index).clamp(0, call.query.shape[0] - 1).flatten()
    query = call.query.index_select(0, at).view(call.batch, -1, *call.query.shape[1:])
    of_rows = lse.index_select(1, at).view(lse.shape[0], call.batch, -1).transpose(0, 1)
    positions = _positions(call, index, lengths, ends[:, None])
    return Rows(query, of_rows, positions.int(), exists, begins, ends)


def _positions(call: Call, index: Tensor, length: int | Tensor, end: int | Tensor) -> Tensor:
    """Where rows stand; a row that sees every key stands at the last one, as the op ignores rows before the first."""
    if call.left < 0 and call.right < 0 and call.alibi is None:
        return torch.zeros_like(index) + (end - 1)
    return index + (end - length)


def _bounds(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Where the keys of each sequence begin and end, in _keys()."""
    if call.cu_k is None:
        return call.leftpad, call.lens
    if call.block_table is not None:
        return None, call.cu_k[1:] - call.cu_k[:-1]
    return call.cu_k[:-1], call.cu_k[1:]
