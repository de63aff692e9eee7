"""The prompts of a benchmark as arithmetic sees them: tokens that each layer computes under a plan, and their cost.

No model runs: the host plans every stage's counts from the layout alone, here as it does when a prompt is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..contract.prefill import PrefillPart
from ..flops import attention_width, layer_flops, linear_weights
from ..layout import FIRST_IMAGE, PADDING, TEXT, BatchLayout, RowLayout, Run, layout_of, read_layout
from ..models.base import Adapter
from ..session import Prefill

Runs = tuple[Run, ...]


@dataclass(frozen=True)
class Cost:
    """What a prefill method leaves of the prompts' work.

    flops_share: of the decoder's prefill FLOPs.   final_keep, mean_keep: image tokens that the last layer computes, and
    the mean over layers, over the prompts' image tokens.
    """

    flops_share: float
    final_keep: float
    mean_keep: float


class Prompts:
    """Prompts and the decoder that reads them.

    Args:
        adapter: of the model.
        rows: runs of text and image tokens of each prompt.
    """

    def __init__(self, adapter: Adapter, rows: Iterable[Runs]) -> None:
        self._adapter = adapter
        self._times = Counter(rows)
        self._weights = [linear_weights(layer) for layer in adapter.layers]
        self._width = attention_width(adapter)
        self._layout = _layout(list(self._times))
        self._full = self._flops([self._layout.rows] * len(self._weights))

    @classmethod
    def of_batches(cls, adapter: Adapter, batches: Iterable[dict[str, Any]]) -> Prompts:
        """Those of batches of inputs, as a run reads them: input_ids (B, S) and attention_mask (B, S), and images."""
        ids = torch.tensor(adapter.image_token_ids())
        rows: list[Runs] = []
        for inputs in batches:
            is_image = torch.isin(inputs["input_ids"].cpu(), ids)
            sizes, grids = adapter.image_shapes(inputs)
            layout = read_layout(is_image, inputs["attention_mask"].cpu().bool(), sizes, grids)
            rows += [row.runs for row in layout.rows]
        return cls(adapter, rows)

    @property
    def one_token(self) -> float:
        """Share of the FLOPs that one token of every prompt takes in all layers: as near as counts can be asked to come
        to a share."""
        fewer = sum(
            layer_flops(weights, self._width, row.tokens - 1) * times
            for weights in self._weights
            for row, times in zip(self._layout.rows, self._times.values(), strict=True)
        )
        return 1 - fewer / self._full

    def cost(self, part: PrefillPart) -> Cost:
        """What a method leaves.

        Raises:
            ValueError: stages that do not fit the decoder.
        """
        levels = rows_at_layers(part, self._layout, self._adapter)
        images = [self._images(rows) for rows in levels]
        all_images = self._images(self._layout.rows)
        return Cost(
            self._flops(levels) / self._full,
            images[-1] / all_images,
            sum(images) / (len(images) * all_images),
        )

    def share_of(self, image_tokens: int) -> float:
        """Share of the FLOPs if every image had so many tokens from the start."""
        rows = self._with_images_of(image_tokens)
        return self._flops([rows] * len(self._weights)) / self._full

    def tokens_share_of(self, image_tokens: int) -> float:
        """Share of all tokens, and of a cache that holds them, if every image had so many from the start."""
        return self._tokens(self._with_images_of(image_tokens)) / self._tokens(self._layout.rows)

    def _with_images_of(self, image_tokens: int) -> list[RowLayout]:
        return [
            RowLayout(
                0, tuple(run if run.image is None else Run(run.image, image_tokens) for run in row.runs)
            )
            for row in self._layout.rows
        ]

    def _tokens(self, rows: Sequence[RowLayout]) -> int:
        return sum(row.tokens * times for row, times in zip(rows, self._times.values(), strict=True))

    def _flops(self, levels: Sequence[Sequence[RowLayout]]) -> int:
        return sum(
            layer_flops(weights, self._width, row.tokens) * times
            for weights, rows in zip(self._weights, levels, strict=True)
            for row, times in zip(rows, self._times.values(), strict=True)
        )

    def _images(self, rows: Sequence[RowLayout]) -> int:
        return sum(
            sum(row.image_sizes) * times for row, times in zip(rows, self._times.values(), strict=True)
        )


def rows_at_layers(part: PrefillPart, layout: BatchLayout, adapter: Adapter) -> list[tuple[RowLayout, ...]]:
    """The rows that each layer of a decoder computes, as a run plans them."""
    prefill = Prefill(part, layout, adapter, torch.device("cpu"))
    return [prefill.tokens_at(layer).rows for layer in range(len(adapter.layers))]


def _layout(rows: Sequence[Runs]) -> BatchLayout:
    """A left-padded batch of such rows."""
    tokens = [sum(run.tokens for run in row) for row in rows]
    length = max(tokens)
    padded = tuple(RowLayout(length - count, row) for count, row in zip(tokens, rows, strict=True))
    return replace(layout_of(torch.stack([_codes(row, length) for row in rows])), rows=padded)


def _codes(row: Runs, length: int) -> Tensor:
    kinds = [
        kind for run in row for kind in [TEXT if run.image is None else FIRST_IMAGE + run.image] * run.tokens
    ]
    return torch.tensor([PADDING] * (length - len(kinds)) + kinds, dtype=torch.int32)
