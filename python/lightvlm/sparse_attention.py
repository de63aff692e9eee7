"""Prefill in which only chosen tokens attend: scores from probe rows, then causal attention among the chosen.

How many tokens are chosen is for the device to know. Buffers keep their upper bound, chosen tokens of all rows stand
one row after the other in them, and attention of variable length stops where each row ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext.ops import Selection

from .contract.sparse import AttentionPart, AttentionScores
from .host import rectangular, upload
from .layout import PADDING, BatchLayout


class SparsePrefill:
    """One prompt under an :class:`AttentionPart`.

    ``drafts``: the logits of so many tokens before the last one are asked for, too.
    """

    def __init__(
        self, part: AttentionPart, layout: BatchLayout, device: torch.device, drafts: int = 0
    ) -> None:
        self.part = part
        self.tail = drafts + 1
        self.tokens = [row.tokens for row in layout.rows]
        self.selections: dict[int, Selection] = {}
        """Layer -> the tokens that attended."""
        rows = [[row.leftpad + at for at in part.probe_rows(row.tokens)] for row in layout.rows]
        self._rows = upload(rectangular(rows, -1), device)
        self._row_counts = upload([len(row) for row in rows], device)
        self._leftpad = upload([row.leftpad for row in layout.rows], device)
        self._valid = upload(layout.codes != PADDING, device, torch.bool)
        at = torch.arange(layout.length, device=device)
        self._forced = self._valid & (at >= layout.length - self.tail)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of a layer. query (B, Hq, S, D), key and value (B, Hkv, S, D); returns (B, S, Hq, D)."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return selected_attention(query, key, value, self.choose(layer, query, key, scale), scale)

    def choose(self, layer: int, query: Tensor, key: Tensor, scale: float | None) -> Selection:
        """The tokens of a layer that attend. query (B, S, Hq, D), key (B, S, Hkv, D)."""
        mass, visible = ops.importance(
            ops.gather_tokens(query, self._rows, self._row_counts),
            key,
            scale=scale,
            row_pos=self._rows,
            leftpad=self._leftpad,
            rows="sum",
            return_visible=True,
        )
        chosen = self.part.choose(AttentionScores(mass, visible, self._valid, self._forced))
        self.selections[layer] = chosen
        return chosen


class Packed(NamedTuple):
    """Chosen tokens of a batch, one row after the other.

    places (1, B * S) int32: where they stand in the flattened batch, ascending, -1 past total.   total (1,) int32.
    ends (B + 1,) int32: where each row begins, and at last total.   slots (B, S) int64: a token's place among the
    chosen, or -1.
    """

    places: Tensor
    total: Tensor
    ends: Tensor
    slots: Tensor


def pack(selection: Selection) -> Packed:
    """The chosen tokens of all rows as one list, without asking the device how many they are."""
    batch, length = selection.inverse.shape
    ends = F.pad(selection.count.cumsum(0, dtype=torch.int32), (1, 0))
    chosen = selection.inverse >= 0
    slots = torch.where(chosen, selection.inverse + ends[:-1, None], -1).long()
    # What is not chosen goes to a place behind the list.
    target = torch.where(chosen, slots, batch * length).flatten()
    places = torch.full((batch * length + 1,), -1, dtype=torch.int32, device=target.device)
    places.scatter_(0, target, torch.arange(batch * length, dtype=torch.int32, device=target.device))
    return Packed(places[None, :-1], ends[-1:], ends, slots)


def selected_attention(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float | None
) -> Tensor:
    """Causal attention among the selected tokens of each row.

    query (B, S, Hq, D), key and value (B, S, Hkv, D).   Returns (B, S, Hq, D), zeros where a token is not selected.
    """
    sixteen = query.dtype in (torch.float16, torch.bfloat16)
    fits = sixteen and query.shape[3] <= 256 and query.shape[3] % 8 == 0 and value.shape[3] == query.shape[3]
    if query.device.type == "cpu" or not fits:
        return _row_by_row(query, key, value, selection, scale)
    packed = pack(selection)
    together = [x.flatten(0, 1)[None] for x in (query, key, value)]
    q, k, v = (x[0] for x in ops.gather_tokens(together, packed.places, packed.total))
    length = query.shape[1]
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, packed.ends, packed.ends, length, length, 0.0, True, False, scale=scale
    )[0]
    return torch.where((packed.slots >= 0)[..., None, None], out[packed.slots.clamp_min(0)], 0)


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float | None
) -> Tensor:
    """On a CPU the counts are at hand, and rows of their own length need no mask. Elsewhere, where FlashAttention does
    not take the numbers, they are asked for once a layer."""
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for row, count in enumerate(selection.count.tolist()):
        chosen = selection.index[row, :count].long()
        q, k, v = (x[row, chosen].transpose(0, 1)[None] for x in (query, key, value))
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[row, chosen] = attended[0].transpose(0, 1)
    return out
