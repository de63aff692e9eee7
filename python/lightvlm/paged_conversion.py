"""A layer in pages as one in a buffer, and the other way round: what a file holds is the same for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .block_rows import make_room
from .cache_layer import CompactLayer
from .host import upload
from .paging import slots

if TYPE_CHECKING:
    from .paged_layer import PagedLayer


def to_buffer(layer: PagedLayer) -> CompactLayer:
    """A layer of a CompactCache that holds the same; one of which nothing is gone has its padding again."""
    out = CompactLayer()
    out.query_rows, out.wants_mass = layer.query_rows, layer.wants_mass
    if not layer.is_initialized:
        return out
    starts, ends, ragged = layer.starts, layer.ends, layer.ragged
    (key, value), mass = layer.buffer(), layer.mass
    if not layer.dropped:
        key, value = (states.transpose(1, 2) for states in layer.whole())
        starts, ends, ragged = (
            [layer.seen - (end - start) for start, end in spans(layer)],
            [layer.seen] * len(ends),
            False,
        )
        if mass is not None:
            before, mass = mass, mass.new_zeros(*mass.shape[:2], layer.seen)
            for row, (start, end) in enumerate(spans(layer)):
                mass[row, :, starts[row] :] = before[row, :, start:end]
    state = {"starts": starts, "ends": ends, "seen": layer.seen, "tail": layer.tail, "ragged": ragged}
    state |= {"dropped": layer.dropped, "scale": layer.scale}
    out.restore(key, value, mass[:, :, : key.shape[1]] if mass is not None else None, state, 0)
    out._queries = list(layer._queries)
    return out


def to_pages(buffers: Sequence[CompactLayer], layers: Sequence[PagedLayer], follows_mask: bool) -> None:
    """Fill empty layers with what layers of a CompactCache hold, padding left out.

    Args:
        buffers: without packed tokens.
        layers: as many, of the same pages.
        follows_mask: whether no attached model has filled the buffers: where padding is, only the mask says.

    Raises:
        ValueError: heads or dtype are not those of the pages.
        OutOfPages: too few pages are free. Nothing has changed then.
    """
    filled = [(buffer, layer) for buffer, layer in zip(buffers, layers, strict=True) if buffer.is_initialized]
    for buffer, layer in filled:
        layer.check_room(*(states.transpose(1, 2) for states in buffer.buffer()))
    if not filled:
        return
    for buffer, layer in filled:
        layer.blocks.start(len(buffer.ends))
    counts = [[end - start for start, end in spans(buffer)] for buffer, _ in filled]
    make_room([layer.blocks for _, layer in filled], [[(0, count) for count in own] for own in counts])
    for (buffer, layer), own in zip(filled, counts, strict=True):
        layer.dtype, layer.device, layer.is_initialized = layer.pages.dtype, layer.pages.device, True
        layer.starts, layer.ends, layer.left_out = [0] * len(own), own, [0] * len(own)
        layer.seen, layer.tail, layer.scale = buffer.seen, buffer.tail, buffer.scale
        layer.ragged, layer.dropped = buffer.ragged or not follows_mask, buffer.dropped
        layer._queries = list(buffer._queries)
        at = upload(
            [
                place
                for row, count in zip(layer.blocks.rows, own, strict=True)
                for place in slots(row, 0, count, layer.pages.page_size)
            ],
            layer.pages.device,
            torch.int64,
        )
        for storage, states in zip((layer.key_storage, layer.value_storage), buffer.buffer(), strict=True):
            rows = [states[row, start:end] for row, (start, end) in enumerate(spans(buffer))]
            storage.view(-1, *storage.shape[2:]).index_copy_(0, at, torch.cat(rows))
        layer._fit_mass()
        if layer.mass is not None and buffer.mass is not None:
            for row, (start, end) in enumerate(spans(buffer)):
                layer.mass[row, :, : end - start] = buffer.mass[row, :, start:end]


def spans(layer: CompactLayer) -> list[tuple[int, int]]:
    """Where each row's tokens stand."""
    return list(zip(layer.starts, layer.ends, strict=True))
