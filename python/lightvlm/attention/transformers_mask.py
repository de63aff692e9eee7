"""The mask function of ``attn_implementation="lightvlm"``.

transformers asks it once a forward, for all layers of a kind: without one it would make no mask at all and ignore
padding without a word. Padding becomes :class:`.row_spans.RowSpans`, from which attention without a mask can be called;
what those cannot say becomes transformers' own explicit mask, (B, 1, Sq, Sk) bool.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .row_spans import RowSpans


class _Pattern(NamedTuple):
    """causal: no key after the row.   left: keys further back than this are hidden, -1: none."""

    causal: bool
    left: int


def make_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **rest: Any,
) -> Tensor | None:
    """The mask of a forward, with the arguments that transformers gives to mask functions.

    It reads the device once where there is a padding mask, as those of transformers do.

    Returns:
        None where nothing is hidden but what causality hides; int32 row spans (see ``row_spans.py``) for padding,
        static caches and sliding windows; and bool (B, 1, Sq, Sk) for everything else: padding amid a row, patterns of
        a model's own (images that look both ways, packed sequences, chunks), callers that will combine it with another
        mask, and padding while a graph is traced, where nothing can be read.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = causal_mask_function if mask_function is None else mask_function
    pattern = _pattern_of(function)
    simple = pattern is not None and (allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip)
    if pattern is not None and simple and not (_tracing() and _would_read(attention_mask, rest)):
        rows, offset = _queries(rest)
        device = attention_mask.device if attention_mask is not None else rest.get("device", "cpu")
        found = _spans(
            pattern, batch_size, rows, offset - kv_offset, kv_length, kv_offset, attention_mask, device
        )
        if found is not None:
            return found.as_mask() if isinstance(found, RowSpans) else None
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **rest,
    )
    return mask


class _Nothing:
    """No key is hidden, but those that causality hides from a row."""


def _spans(
    pattern: _Pattern,
    batch: int,
    rows: int,
    first: int | Tensor,
    keys: int,
    offset: int,
    attention_mask: Tensor | None,
    device: Any,
) -> RowSpans | _Nothing | None:
    """What is seen; None if spans cannot say it.   first: the key at which the first query stands."""
    end = first + rows
    left = pattern.left if pattern.left < keys - 1 else -1
    at_the_end = isinstance(end, int) and end == keys  # the last query stands at the last key
    if isinstance(end, int) and end > keys and pattern.causal:
        return None
    if left >= 0 and not pattern.causal and not at_the_end:
        return None
    valid = None if attention_mask is None else _of_keys(attention_mask.bool(), keys, offset)
    whole = left < 0 and (at_the_end or not pattern.causal)
    if valid is None:
        if whole:
            return _Nothing()
        begins = torch.zeros(batch, dtype=torch.int32, device=device)
        ends = torch.full_like(begins, keys)
    else:
        index = torch.arange(keys, device=valid.device, dtype=torch.int32)
        begins = torch.where(valid, index, keys).amin(dim=1)
        ends = torch.where(valid, index + 1, 0).amax(dim=1)
        in_one_piece = (valid.sum(dim=1) == (ends - begins).clamp(min=0)).all()
        one, all_valid, to_the_end = torch.stack((in_one_piece, valid.all(), (ends == keys).all())).tolist()
        if not one:
            return None
        if all_valid and whole:
            return _Nothing()
        if left >= 0 and not pattern.causal and not to_the_end:
            return None  # rows are counted from the end of their keys
    stop = torch.as_tensor(end, dtype=torch.int32, device=begins.device).expand(batch)
    if rows == 1 and pattern.causal:
        # One row sees one stretch of keys, whatever the pattern; with the window in it no kernel needs to know of one.
        if left >= 0:
            begins = torch.maximum(begins, stop - 1 - left)
        pattern, left, ends = _Pattern(False, -1), -1, torch.minimum(ends, stop)
    elif pattern.causal:
        # Rows stand at their place in the cache. Padding behind the last token is hidden from all tokens by causality.
        ends = stop
    return RowSpans(torch.minimum(begins, ends), ends, pattern.causal, left)


def _of_keys(mask: Tensor, keys: int, offset: int) -> Tensor:
    """(B, keys): the padding mask of the keys that the cache shows; beyond the mask there is nothing yet."""
    missing = keys + offset - mask.shape[-1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing))
    return mask[:, offset : offset + keys]


def _queries(rest: dict[str, Any]) -> tuple[int, int | Tensor]:
    """How many queries there are and where the first stands; transformers 5.0 gives the positions of all."""
    positions = rest.get("cache_position")
    if positions is not None:
        return positions.shape[0], int(positions[0])
    return rest["q_length"], rest.get("q_offset", 0)


def _pattern_of(function: Callable[..., Any]) -> _Pattern | None:
    """The pattern that a mask function of transformers stands for; None if it is none that spans can say.

    Functions with options are closures, which are told by their code and asked for the values they hold. A traced graph
    cannot look into them.
    """
    from transformers import masking_utils as made

    if function is made.causal_mask_function:
        return _Pattern(True, -1)
    if function is getattr(made, "bidirectional_mask_function", None):
        return _Pattern(False, -1)
    if _tracing():
        return None
    parts = _held(function, made.and_masks()).get("mask_functions", ())
    if len(parts) != 2:
        return None
    if parts[1] is made.causal_mask_function:
        window = _held(parts[0], made.sliding_window_overlay(1)).get("sliding_window")
        return None if window is None else _Pattern(True, window - 1)
    both_ways = getattr(made, "sliding_window_bidirectional_overlay", None)
    if both_ways is not None and parts[1] is made.bidirectional_mask_function:
        window = _held(parts[0], both_ways(1)).get("sliding_window")
        return None if window is None else _Pattern(False, window)
    return None


def _held(function: Callable[..., Any], like: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure holds, if it was made by the same code as ``like``."""
    if not isinstance(function, FunctionType) or not isinstance(like, FunctionType):
        return {}
    if function.__code__ is not like.__code__ or function.__closure__ is None:
        return {}
    values = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, values, strict=True))


def _would_read(attention_mask: Tensor | None, rest: dict[str, Any]) -> bool:
    return attention_mask is not None or "cache_position" in rest


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
