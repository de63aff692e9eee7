"""What the layers of a paged cache do together: take pages for the next tokens, and move what stays to the front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightvlm_ext import ops

from .block_rows import make_room, upload_tables
from .host import upload

if TYPE_CHECKING:
    from .paged_layer import PagedLayer


def reserve(layers: Sequence[PagedLayer], new: int) -> None:
    """Take the pages that ``new`` more tokens of every row need, in all of these layers or in none, and say where the
    tokens go: one upload for all layers, and another where the block tables changed.

    Raises:
        OutOfPages: too few are free; nothing has changed then.
    """
    several = [layer.blocks for layer in layers]
    spans = [[(end, end + new) for end in layer.ends] for layer in layers]
    make_room(several, spans)
    if any(blocks.stale for blocks in several):
        upload_tables(several)
    pages, batches = layers[0].pages, [len(layer.ends) for layer in layers]
    places: list[int] = []
    for blocks, own in zip(several, spans, strict=True):
        for row, (begin, end) in zip(blocks.rows, own, strict=True):
            places += slots(row, begin, end, pages.page_size)
    of_layer = upload(places, pages.device, torch.int64).split([batch * new for batch in batches])
    starts, ends = upload(
        [[start for layer in layers for start in layer.starts], [end for own in spans for _, end in own]],
        pages.device,
    )
    parts = zip(layers, of_layer, starts.split(batches), ends.split(batches), strict=True)
    for layer, own_places, first, last in parts:
        layer._slots, layer._bounds_to_come = own_places, (first, last)


def slots(row: list[int], begin: int, end: int, size: int) -> list[int]:
    """Where tokens [begin, end) of a row stand among the tokens of all pages."""
    found: list[int] = []
    while begin < end:
        block, at = divmod(begin, size)
        number = min(size - at, end - begin)
        first = row[block] * size + at
        found.extend(range(first, first + number))
        begin += number
    return found


def move_pages(layers: Sequence[PagedLayer], index: Sequence[Tensor], count: Sequence[Tensor]) -> None:
    """Move tokens, and what they received, to the front of their rows: the pages of all layers in one launch, what was
    received in another. Pages that others use are copied before: up to the most that may stay of a row, for
    which token is the first to move, the device alone knows.

    Args:
        index: for each layer (B, M) int32, tokens that stay.   count: for each (B,) int32.

    Raises:
        OutOfPages: too few are free for the copies; nothing has changed then.
    """
    pages, several = layers[0].pages, [layer.blocks for layer in layers]
    most = [one.shape[1] for one in index]
    make_room(
        several,
        [[(0, min(end, few)) for end in layer.ends] for layer, few in zip(layers, most, strict=True)],
    )
    padded = [torch.nn.functional.pad(one, (0, max(most) - one.shape[1]), value=-1) for one in index]
    # Without users of the pages: what is written has no others, and the op need not look.
    ops.compact_paged_kv_(
        pages.key_pages,
        pages.value_pages,
        upload_tables(several),
        torch.cat(padded),
        torch.cat(list(count)),
        lens=upload([end for layer in layers for end in layer.ends], pages.device),
    )
    received = [
        (layer.mass.transpose(1, 2)[..., None], one, number)
        for layer, one, number in zip(layers, index, count, strict=True)
        if layer.mass is not None
    ]
    if received:  # one number a token and head; there are no values beside it
        masses, indexes, counts = ([part[i] for part in received] for i in range(3))
        ops.compact_kv_(masses, [mass[..., :0] for mass in masses], indexes, counts)
