"""compact_paged_kv_: kept rows of a paged KV cache to the front of their block tables, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _errors, _library
from .._compact_paged_args import PagedCompaction, allocate, check_paged
from .._observe import observed


@observed
def compact_paged_kv_(
    key_pages: torch.Tensor | Sequence[torch.Tensor],
    value_pages: torch.Tensor | Sequence[torch.Tensor],
    block_table: torch.Tensor | Sequence[torch.Tensor],
    index: torch.Tensor | Sequence[torch.Tensor],
    count: torch.Tensor | Sequence[torch.Tensor],
    *,
    lens: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    refcount: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    extras: Sequence[torch.Tensor] | Sequence[torch.Tensor | Sequence[torch.Tensor]] = (),
) -> PagedCompaction | list[PagedCompaction]:
    """Moves the kept rows of paged keys and values to the front of their sequences, in place.

    Token n of sequence b lies in page block_table[b, n // page_size], at n % page_size. Token j becomes the old token
    index[j], for j < count; tokens past count keep unspecified content. A sequence keeps its first
    ceil(count / page_size) pages and gives up the rest. The block table itself stays as it is: whoever owns it drops
    the blocks past row_pages. Lists of layers move in one launch (up to 124 layers with tables or indexes of their
    own); nothing of the cache's order of size is allocated, nothing is read back to the host.

    Args:
        key_pages: (P, page_size, Hkv, D), any dtype and any strides, moved as bytes; (P, Hkv, page_size, D) storage
            comes as a transposed view. Or a list of such, one per layer; Hkv, D and dtype may differ by layer.
            Layers whose pages come from one tensor are further rows of its table, not a list.
        value_pages: as key_pages; D may differ.
        block_table: (B, max_blocks) int32, page of each block of tokens; one for all layers (which then have as many
            pages, equally large), or a list with one for each. What stands past a sequence's pages is not read.
        index: (B, M) int32, strictly ascending up to count, what stands past count is not read; or (B, Hkv, M), where
            each head keeps tokens of its own. One for all layers, or a list with one for each. Heads and layers
            under one table share its pages: a page is given up only where the tail of all of them is empty.
        count: (B,) or (B, Hkv) int32, in [0, M]; as index.
        lens: (B,) int32, tokens of each sequence before; default: as many as its blocks hold. One for all tables, or
            a list of one for each.
        refcount: (P,) int32, users of each page; default: one each. As lens. A page with more than one, a shared
            prefix say, may be kept as it is, but not be written.
        extras: further tensors that move alike: (P, page_size, ...); with an index per head, (P, page_size, Hkv, ...).
            For lists of layers: one entry per layer, a tensor or a list of tensors.

    Returns:
        PagedCompaction(row_pages, freed, freed_count), on the device; for a list of block tables a list of such.
        For a list of no layers, an empty list.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not fit, or two tensors share memory. On the CPU also: an index outside
            [0, lens) or not above the one before, a count outside [0, M], lens beyond the table, a page in use outside
            [0, P), or a sequence that would write into a page with refcount > 1 or into one that the table names
            twice. Nothing has moved then. On CUDA these set the device error word (`lightvlm_ext.device_errors`), but
            for the last, which is not looked for there: the sequence (with an index per head: that head of it) does not
            move, and the sequence keeps all its pages.
    """
    args = check_paged(key_pages, value_pages, block_table, index, count, lens, refcount, extras)
    if not args.pages:
        return []
    device = args.pages[0].device
    _library.check_backend(device)
    found = allocate(args)
    _library.op("compact_paged_kv")(
        args.pages,
        args.by,
        args.index,
        args.count,
        args.of,
        args.block_table,
        args.lens,
        args.refcount,
        [one.row_pages for one in found],
        [one.freed for one in found],
        [one.freed_count for one in found],
        _errors.error_word("compact_paged_kv_", device),
    )
    _errors.check_now("compact_paged_kv_", device)
    return found[0] if isinstance(block_table, torch.Tensor) else found


@_library.register_fake("compact_paged_kv")
def _compact_paged_kv_fake(
    pages: list[torch.Tensor],
    by: list[int],
    index: list[torch.Tensor],
    count: list[torch.Tensor],
    of: list[int],
    block_table: list[torch.Tensor],
    lens: list[torch.Tensor | None],
    refcount: list[torch.Tensor | None],
    row_pages: list[torch.Tensor],
    freed: list[torch.Tensor],
    freed_count: list[torch.Tensor],
    error: torch.Tensor | None,
) -> None:
    return None
