"""The rows that score at a stage, and what they see: a method's :class:`~lightvlm.methods.base.Probe` at work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from lightvlm_ext import ops

from .contract.prefill import Probe
from .host import rectangular, upload
from .layout import RowLayout

if TYPE_CHECKING:
    from .session import Level


def probe_positions(level: Level, probe: Probe, drafts: int) -> list[list[int]]:
    """For each row of the batch the places of its probe rows. The last ``drafts`` tokens are none."""
    return [
        _positions(row, start, probe, drafts) for row, start in zip(level.rows, level.starts, strict=True)
    ]


def _positions(row: RowLayout, start: int, probe: Probe, drafts: int) -> list[int]:
    """Text after an image, at most so many, else the last token; or all tokens."""
    end = question_tokens(row, drafts)
    if probe.rows == "all":
        return [start + position for position in range(end)]
    positions = row.text_positions_after_image() if probe.rows == "text" else []
    positions = [position for position in positions if position < end][-probe.limit :]
    return [start + position for position in positions or [end - 1]]


def question_tokens(row: RowLayout, drafts: int) -> int:
    """Tokens of a row that belong to the question: all of them, where the drafts would leave none or reach an image."""
    return row.tokens - (drafts if drafts <= row.trailing_text and drafts < row.tokens else 0)


@overload
def gather_rows(x: Tensor, positions: list[list[int]]) -> tuple[Tensor, list[list[int]]]: ...


@overload
def gather_rows(x: list[Tensor], positions: list[list[int]]) -> tuple[list[Tensor], list[list[int]]]: ...


def gather_rows(x: Any, positions: list[list[int]]) -> tuple[Any, list[list[int]]]:
    """Rows (B, W, ...) of (B, M, ...) at the positions, and where each stands, or -1 where a batch row has fewer."""
    many = isinstance(x, list)
    length, width = (x[0] if many else x).shape[1], max(len(row) for row in positions)
    if all(
        row == list(range(length - len(row), length)) for row in positions
    ):  # the usual prompt: image, then text
        cut = [one[:, length - width :] for one in x] if many else x[:, length - width :]
        return cut, [[-1] * (width - len(row)) + row for row in positions]
    padded = rectangular(positions, -1)
    device = (x[0] if many else x).device
    index = upload(padded, device)
    count = upload([len(row) for row in positions], device)
    return ops.gather_tokens(x, index, count), padded


def spread(
    probe: Probe,
    level: Level,
    drafts: int,
    rows: Tensor,
    row_pos: list[list[int]],
    key: Tensor,
    scale: float | None,
) -> Tensor:
    """What each token receives as a query when every key spreads mass 1 over all queries, (B, M) fp32.

    rows (B, W, Hq, D): queries of the tokens at ``row_pos``, which are each batch row's last ones but for drafts.
    key (B, M, Hkv, D): of which ``probe.keys`` says which spread.
    """
    batch, length = key.shape[:2]
    lens = None
    if probe.keys == "text":
        places = [
            [start + at for at in row.text_positions() if at < question_tokens(row, drafts)]
            for row, start in zip(level.rows, level.starts, strict=True)
        ]
        lens = upload([len(row) for row in places], key.device)
        index = upload(rectangular(places, -1), key.device)
        key = ops.gather_tokens(key, index, lens)
    leftpad = None if lens is not None else upload(level.starts, key.device)
    received = ops.importance(
        rows,
        key,
        scale=scale,
        causal=False,
        row_pos=upload(row_pos, key.device),
        lens=lens,
        leftpad=leftpad,
        axis="query",
    )
    if received.shape[1] == length and all(
        at in (-1, place) for row in row_pos for place, at in enumerate(row)
    ):
        return received
    scores = received.new_zeros(batch, length)
    for row, at in enumerate(row_pos):  # contiguous stretches, known on the host
        inside = [place for place in at if place >= 0]
        if not inside:  # all of it is padding
            continue
        first = at.index(inside[0])
        scores[row, inside[0] : inside[-1] + 1] = received[row, first : first + len(inside)]
    return scores


def coming_keys(layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys (B, M, Hkv, D) that a decoder layer would have for (B, M, C), as its attention gets them.

    cos, sin: (B, M, D), as the layer gets them.
    """
    return _project(layer, "k", hidden, cos, sin)


def coming_queries(layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries (B, W, Hq, D), like :func:`coming_keys`."""
    return _project(layer, "q", hidden, cos, sin)


def _project(layer: Any, name: str, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    attention = layer.self_attn
    x = getattr(attention, f"{name}_proj")(layer.input_layernorm(hidden))
    x = x.view(*x.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{name}_norm", None)
    x = x if norm is None else norm(x)
    if cos.dim() == 4:  # transformers 5.0 leaves M-RoPE's axes apart: (B, M, 3, D)
        sections = 2 * list(attention.config.rope_parameters["mrope_section"])
        cos, sin = (
            torch.cat([part[:, :, at % 3] for at, part in enumerate(table.split(sections, dim=-1))], dim=-1)
            for table in (cos, sin)
        )
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]


def scale_of(layer: Any) -> float | None:
    """What a decoder layer multiplies its attention logits by."""
    return getattr(layer.self_attn, "scaling", None)


def check_look_ahead(layer: Any) -> None:
    """Raise a ValueError unless :func:`coming_keys` knows how a decoder layer projects."""
    attention = getattr(layer, "self_attn", None)
    needed = ("q_proj", "k_proj", "head_dim")
    lacks = [name for name in needed if not hasattr(attention, name)]
    if lacks or not hasattr(layer, "input_layernorm"):
        raise ValueError(
            f"plan scores with the coming layer's queries and keys, which a {type(layer).__name__} does not have where "
            f"lightvlm looks ({', '.join(lacks) or 'input_layernorm'})"
        )
