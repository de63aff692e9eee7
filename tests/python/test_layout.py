"""Where the images of a batch are: padding, several images in a row, adjacent and split ones, wrong sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightvlm.layout import FIRST_IMAGE, PADDING, TEXT, LayoutError, RowLayout, Run, read_layout


def read(rows: list[str], sizes: list[int] | None = None):
    """Rows are written as text: '.' is padding, 't' text, 'i' an image token."""
    is_image = torch.tensor([[token == "i" for token in row] for row in rows])
    valid = torch.tensor([[token != "." for token in row] for row in rows])
    return read_layout(is_image, valid, sizes)


def test_one_row() -> None:
    layout = read(["ttiiit"], [3])
    assert layout.rows == (RowLayout(0, (Run(None, 2), Run(0, 3), Run(None, 1))),)
    assert layout.codes.tolist() == [[TEXT, TEXT, FIRST_IMAGE, FIRST_IMAGE, FIRST_IMAGE, TEXT]]
    assert layout.within.tolist() == [[0, 0, 0, 1, 2, 0]]
    assert layout.length == 6
    assert layout.has_images
    assert layout.max_images == 1
    (row,) = layout.rows
    assert (row.tokens, row.image_sizes, row.trailing_text) == (6, (3,), 1)
    assert row.text_positions_after_image() == [5]


def test_left_padding_several_images_and_rows_without_one() -> None:
    layout = read(["..tiitiit", "ttttttttt", "........i"], [2, 2, 1])
    first, second, third = layout.rows
    assert first == RowLayout(2, (Run(None, 1), Run(0, 2), Run(None, 1), Run(1, 2), Run(None, 1)))
    assert first.text_positions_after_image() == [3, 6]
    assert second == RowLayout(0, (Run(None, 9),))
    assert (second.trailing_text, second.image_sizes, second.text_positions_after_image()) == (9, (), [])
    assert third == RowLayout(8, (Run(0, 1),))
    assert third.trailing_text == 0
    assert layout.codes[0, :3].tolist() == [PADDING, PADDING, TEXT]
    assert layout.codes[0, 6:8].tolist() == [FIRST_IMAGE + 1] * 2
    assert layout.max_images == 2


def test_sizes_part_adjacent_images() -> None:
    (row,) = read(["tiiiiit"], [2, 3]).rows
    assert row.image_sizes == (2, 3)
    assert read(["tiiiiit"], [2, 3]).within.tolist() == [[0, 0, 1, 0, 1, 2, 0]]
    assert read(["tiiiiit"]).rows[0].image_sizes == (5,)


def test_row_of_nothing_but_padding() -> None:
    layout = read(["...", "tit"], [1])
    assert layout.rows[0] == RowLayout(3, ())
    assert layout.rows[0].tokens == layout.rows[0].trailing_text == 0
    assert layout.codes[0].tolist() == [PADDING] * 3


def test_placeholders_in_the_padding_do_not_count() -> None:
    is_image = torch.tensor([[True, True, False, True, False]])
    valid = torch.tensor([[False, False, True, True, True]])
    assert read_layout(is_image, valid, [1]).rows[0].image_sizes == (1,)


@pytest.mark.parametrize("row", ["tit.", "t.t", ".ti.t", "..t."])
def test_other_padding_is_refused(row: str) -> None:
    with pytest.raises(LayoutError, match=r"not left padding \(holes or padding on the right\)"):
        read([row])


@pytest.mark.parametrize(
    ("rows", "sizes", "message"),
    [
        (["tiit"], [3], "interrupted by text, or too few"),
        (["tiiti"], [3], "interrupted by text, or too few"),
        (["tii", "iit"], [4], "interrupted by text, or too few"),
        (["tiit"], [1], "more image placeholders than the images have tokens"),
        (["tiit"], [], "more image placeholders than the images have tokens"),
        (["tiit"], [2, 2], "1 images have no placeholder tokens"),
        (["ttt"], [2, 2], "2 images have no placeholder tokens"),
    ],
)
def test_sizes_that_do_not_fit(rows: list[str], sizes: list[int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        read(rows, sizes)


@st.composite
def prompts(draw: st.DrawFn) -> list[list[int]]:
    """Rows of items: 0 is a text token, n > 0 an image of n tokens."""
    items = st.one_of(st.just(0), st.integers(1, 4))
    return draw(st.lists(st.lists(items, max_size=8), min_size=1, max_size=4).filter(any))


@given(prompts(), st.integers(0, 2))
def test_any_layout(rows: list[list[int]], extra: int) -> None:
    codes = [[c for number, item in enumerate(row) for c in _codes(row, number, item)] for row in rows]
    length = max(map(len, codes)) + extra
    padded = [[PADDING] * (length - len(row)) + row for row in codes]
    expected = torch.tensor(padded, dtype=torch.int32).reshape(len(rows), length)
    layout = read_layout(
        expected >= FIRST_IMAGE, expected != PADDING, [item for row in rows for item in row if item]
    )
    assert torch.equal(layout.codes, expected)
    for b, row in enumerate(rows):
        assert layout.rows[b].image_sizes == tuple(item for item in row if item)
        assert layout.rows[b].tokens == len(codes[b])
        assert layout.rows[b].leftpad == length - len(codes[b])
        positions = [
            i for i, code in enumerate(codes[b]) if code == TEXT and max(codes[b][:i], default=0) > TEXT
        ]
        assert layout.rows[b].text_positions_after_image() == positions
        for image, size in enumerate(layout.rows[b].image_sizes):
            assert layout.within[b][expected[b] == FIRST_IMAGE + image].tolist() == list(range(size))


def _codes(row: list[int], number: int, item: int) -> list[int]:
    image = sum(1 for other in row[:number] if other)
    return [FIRST_IMAGE + image] * item if item else [TEXT]
