"""Row spans say what transformers' explicit mask says, or are not used."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightvlm.attention.row_spans import RowSpans, from_mask, is_spans
from lightvlm.attention.transformers_mask import make_mask
from torch import Tensor
from transformers import masking_utils as made


def visible(spans: RowSpans, rows: int, keys: int) -> Tensor:
    """(B, Sq, Sk) bool, as RowSpans defines it."""
    at = torch.arange(rows)[None, :, None] + spans.end[:, None, None] - rows
    key = torch.arange(keys)
    seen = (key >= spans.begin[:, None, None]) & (key < spans.end[:, None, None])
    if spans.causal:
        seen = seen & (key <= at)
    if spans.left >= 0:
        seen = seen & (key >= at - spans.left)
        if not spans.causal:
            seen = seen & (key <= at + spans.left)
    return seen.expand(-1, rows, -1)


def seen_by_none(causal: bool, rows: int, keys: int) -> Tensor:
    """What a mask of None stands for: row i at key i + keys - rows."""
    at = torch.arange(rows)[:, None] + keys - rows
    return torch.arange(keys) <= at if causal else torch.ones(rows, keys, dtype=torch.bool)


PATTERNS = {
    "causal": (made.causal_mask_function, True),
    "window": (made.sliding_window_causal_mask_function(3), True),
    "full": (made.bidirectional_mask_function, False),
}
if hasattr(made, "sliding_window_bidirectional_mask_function"):  # not in transformers 5.0
    PATTERNS["both ways"] = (made.sliding_window_bidirectional_mask_function(2), False)


def queries(rows: int, place: int) -> dict[str, Any]:
    """How transformers says where queries stand: 5.0 by their positions."""
    if "cache_position" in inspect.signature(made.sdpa_mask).parameters:
        return {"cache_position": torch.arange(place, place + rows)}
    return {"q_length": rows, "q_offset": place}


LIMITS = {"causal": None, "window": 3, "full": None, "both ways": 2}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_spans_see_what_the_explicit_mask_does(data: st.DataObject) -> None:
    """Caches that grow, that are static (longer than what is in them, with a tensor for their length), and that slide;
    rows padded on either side, not at all, wholly, or in the middle."""
    name = data.draw(st.sampled_from(sorted(PATTERNS)))
    function, causal = PATTERNS[name]
    rows, past = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 6))
    spare = data.draw(st.integers(0, 3))
    offset = data.draw(st.integers(0, past)) if name in ("window", "both ways") else 0
    keys = past + rows + spare - offset
    place: Any = torch.tensor(past) if data.draw(st.booleans()) else past
    padding = None
    if data.draw(st.booleans()):
        bit = st.sampled_from([True, True, True, False])
        padding = torch.tensor(
            [data.draw(st.lists(bit, min_size=past + rows, max_size=past + rows)) for _ in "12"]
        )
    common: dict[str, Any] = {
        "batch_size": 2,
        "kv_length": keys,
        **queries(rows, place),
        "kv_offset": offset,
        "mask_function": function,
        "attention_mask": padding,
        "local_size": LIMITS[name],
        "dtype": torch.float32,
        "config": None,
        "use_vmap": False,
        "device": "cpu",
    }
    skips = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
    exact = made.sdpa_mask(**common | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    mask = make_mask(**common, **skips)
    if mask is None:
        found = seen_by_none(causal, rows, keys).expand(2, -1, -1)
    elif is_spans(mask):
        found = visible(from_mask(mask.contiguous()), rows, keys)
    else:
        found = mask[:, 0]
    assert found.shape == (2, rows, keys)
    tokens = torch.ones(2, rows, dtype=torch.bool) if padding is None else padding[:, past:]
    if rows == 1:
        tokens = torch.ones_like(tokens)  # one query is always exact, even if its own key is hidden
    assert torch.equal(found[tokens], exact[:, 0][tokens])
    if padding is not None and not causal:
        assert torch.equal(found, exact[:, 0])


def test_nothing_is_made_where_nothing_is_hidden() -> None:
    ones = torch.ones(2, 5, dtype=torch.bool)
    for mask in (None, ones):
        assert make_mask(2, 5, q_length=5, q_offset=0, attention_mask=mask) is None
        assert make_mask(2, 5, q_length=1, q_offset=4, attention_mask=mask) is None
        full = {"mask_function": made.bidirectional_mask_function, "allow_is_bidirectional_skip": True}
        assert make_mask(2, 5, q_length=5, attention_mask=mask, allow_is_causal_skip=False, **full) is None
        wide = made.sliding_window_causal_mask_function(5)
        assert make_mask(2, 5, q_length=5, attention_mask=mask, mask_function=wide, local_size=5) is None


def test_padding_and_windows_are_short_masks() -> None:
    """The tensor's memory does not grow with the sequence, unless it is made contiguous: then with the window."""
    left = torch.tensor([[False, False, True, True], [True] * 4])
    for padding, begins in ((left, [2, 0]), (left.flip(1), [0, 0])):
        mask = make_mask(2, 4, q_length=4, attention_mask=padding)
        assert mask is not None
        assert is_spans(mask)
        spans = from_mask(mask)
        assert (spans.begin.tolist(), spans.end.tolist(), spans.causal, spans.left) == (
            begins,
            [4, 4],
            True,
            -1,
        )
    window = make_mask(
        2, 4, q_length=4, mask_function=made.sliding_window_causal_mask_function(2), local_size=2
    )
    assert window is not None
    assert (from_mask(window).left, from_mask(window).causal) == (1, True)
    assert window.untyped_storage().nbytes() == 2 * 2 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"allow_is_causal_skip": False},
        {"mask_function": made.and_masks(made.causal_mask_function, lambda b, h, q, k: k != 1)},
        {
            "mask_function": made.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.int)),
            "local_size": 2,
        },
        {"attention_mask": torch.tensor([[True, False, True, True], [True] * 4])},
    ],
    ids=["materialize", "own pattern", "chunks", "hole"],
)
def test_all_else_is_the_explicit_mask(options: dict[str, Any]) -> None:
    options = options | queries(4, 0) | {"batch_size": 2, "kv_length": 4, "device": "cpu"}
    mask = make_mask(**options)
    assert mask is not None
    exact = made.sdpa_mask(**options | {"allow_is_causal_skip": False})
    assert mask.dtype == torch.bool
    assert torch.equal(mask, exact)


def test_an_older_transformers_gives_positions() -> None:
    padding = torch.tensor([[False, True, True, True, True]])
    mask = make_mask(1, 5, cache_position=torch.tensor([3, 4]), attention_mask=padding)
    assert mask is not None
    assert from_mask(mask) == RowSpans(torch.tensor([1]), torch.tensor([5]), True, -1)
    assert make_mask(1, 5, cache_position=torch.tensor([3, 4])) is None
