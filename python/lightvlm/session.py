"""A prompt's way through the layers of an attached decoder.

The host knows how long every row is at every layer; the device is asked only where the image tokens are, once
per prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightvlm_ext import ops

from .host import upload
from .layout import FIRST_IMAGE, TEXT, BatchLayout, RowLayout, Run
from .methods.base import PrefillPart, Probe, StageInput, keep_count

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Level:
    """The batch between two stages: its rows, and the layers' inputs cut to their length."""

    rows: tuple[RowLayout, ...]
    length: int

    @property
    def starts(self) -> list[int]:
        """Padding of each row; rows stand flush right."""
        return [self.length - row.tokens for row in self.rows]

    @property
    def tail(self) -> int:
        """Tokens at the end of every row that no reduction touches."""
        return min((row.trailing_text for row in self.rows), default=0)


@dataclass(frozen=True)
class StagePlan:
    """A stage for this batch: what stays of every image, known before the layer runs."""

    after: Level
    keep: list[list[int]]


def plan_stage(level: Level, originals: list[tuple[int, ...] | None], keep: float) -> StagePlan:
    """Counts and layout after keeping ``keep`` of each image's original tokens (never more than are left).

    ``originals``: tokens that the images of each row had at first; None: the row keeps all.
    """
    rows, counts = [], []
    for row, original in zip(level.rows, originals, strict=True):
        kept: list[int] = []
        runs = []
        for run in row.runs:
            if run.image is None:
                runs.append(run)
            else:
                wanted = run.tokens if original is None else keep_count(original[run.image], keep)
                kept.append(min(run.tokens, wanted))
                runs.append(Run(run.image, kept[-1]))
        rows.append(RowLayout(0, tuple(runs)))
        counts.append(kept)
    length = max(row.tokens for row in rows)
    return StagePlan(Level(tuple(rows), length), counts)


class Prefill:
    """Reduces the hidden states of one prompt on their way through the layers.

    The last ``drafts`` tokens are answers to be verified or rated, not part of the question: they do not score.
    """

    def __init__(
        self, part: PrefillPart, layout: BatchLayout, layers: int, device: torch.device, drafts: int = 0
    ) -> None:
        self.part = part
        self.drafts = drafts
        first = Level(layout.rows, layout.length)
        self.levels = [first]
        self.stages: dict[int, StagePlan] = {}
        # Each row decides for itself, so that it is reduced alike alone and in a batch.
        originals = [
            row.image_sizes if sum(row.image_sizes) >= part.min_image_tokens else None for row in layout.rows
        ]
        for stage in part.stages(layers):
            planned = plan_stage(self.levels[-1], originals, stage.keep)
            self.stages[stage.layer] = planned
            self.levels.append(planned.after)
        self.level = first
        self._codes = upload(layout.codes, device)
        self._within = upload(layout.within, device)
        self._inputs: dict[str, Any] = {}
        self._scores: Tensor | None = None

    @property
    def reduced(self) -> bool:
        """Whether a stage has run: from then on layers get our inputs instead of the model's."""
        return self.level is not self.levels[0]

    def tokens_at(self, layer: int) -> Level:
        """The level that a layer computes on."""
        passed = sum(stage <= layer for stage in self.stages)
        return self.levels[passed]

    def scores_at(self, layer: int) -> bool:
        """Whether the attention of this layer must score the tokens: a stage comes right after it."""
        return layer + 1 in self.stages and self.part.probe is not None

    def score(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Score this level's tokens. query (B, Hq, M, D), key (B, Hkv, M, D), as attention gets them."""
        probe = self.part.probe
        assert probe is not None
        positions = [
            _probe_positions(row, start, probe, self.drafts)
            for row, start in zip(self.level.rows, self.level.starts, strict=True)
        ]
        rows, row_pos = _gather_rows(query.transpose(1, 2), positions)
        device = query.device
        self._scores = ops.importance(
            rows,
            key.transpose(1, 2),
            scale=scale,
            row_pos=upload(row_pos, device),
            leftpad=upload(self.level.starts, device),
            rows=probe.over_rows,
            heads=probe.over_heads,
        )

    def enter(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states a layer shall get; its keyword arguments are cut to them in place."""
        stage = self.stages.get(layer)
        if stage is not None:
            hidden = self._reduce(stage, hidden, kwargs)
        if self.reduced:
            kwargs.update(self._inputs)
        return hidden

    def kept(self) -> list[list[list[int]]]:
        """Row -> image -> indices (in the original image) of the tokens that are left; reads the device."""
        found = []
        for row, codes, within in zip(
            self.levels[0].rows, self._codes.tolist(), self._within.tolist(), strict=True
        ):
            images: list[list[int]] = [[] for _ in row.image_sizes]
            for code, index in zip(codes, within, strict=True):
                if code >= FIRST_IMAGE:
                    images[code - FIRST_IMAGE].append(index)
            found.append(images)
        return found

    def _reduce(self, stage: StagePlan, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        images = max(len(kept) for kept in stage.keep)
        keep = upload([kept + [0] * (images - len(kept)) for kept in stage.keep], hidden.device)
        segment = torch.where(self._codes >= FIRST_IMAGE, self._codes - FIRST_IMAGE, -1).to(torch.int32)
        reduced = self.part.reduce(
            StageInput(
                hidden=hidden,
                scores=self._scores,
                segment=segment,
                within=self._within,
                text=self._codes == TEXT,
                keep=keep,
                capacity=stage.after.length,
            )
        )
        before = self._inputs if self.reduced else kwargs
        self._cut(before, reduced.selection.index, reduced.selection.count, hidden.shape[0])
        self._scores = None
        self.level = stage.after
        return reduced.hidden

    def _cut(self, before: dict[str, Any], index: Tensor, count: Tensor, batch: int) -> None:
        """Cut everything that runs along the tokens to the kept ones, in one launch."""
        cos, sin = before["position_embeddings"]
        position_ids = before.get("position_ids")
        streams = [_tokens_second(cos, batch), _tokens_second(sin, batch), self._codes, self._within]
        if position_ids is not None:
            streams.append(_tokens_second(position_ids[..., None], batch))
        cut = ops.gather_tokens(streams, index, count, align="right")
        self._codes, self._within = cut[2], cut[3]
        self._inputs = {
            "position_embeddings": (_tokens_back(cut[0], cos.dim()), _tokens_back(cut[1], sin.dim())),
            "attention_mask": None,
        }
        if position_ids is not None:
            self._inputs["position_ids"] = _tokens_back(cut[4], position_ids.dim() + 1)[..., 0]


def text_places(layout: BatchLayout, prefill: Prefill | None, layers: int) -> list[list[list[int]]]:
    """For each layer and row, where text stands in what the layer computes on."""
    found = []
    for index in range(layers):
        level = prefill.tokens_at(index) if prefill is not None else Level(layout.rows, layout.length)
        found.append(
            [
                [start + at for at in row.text_positions()]
                for row, start in zip(level.rows, level.starts, strict=True)
            ]
        )
    return found


def _tokens_second(x: Tensor, batch: int) -> Tensor:
    """(..., B or 1, S, D) as (B, S, ..., D): rotary tables may
    have M-RoPE's axes in front, or one shared row."""
    if x.shape[-3] != batch:
        x = x.expand(*x.shape[:-3], batch, *x.shape[-2:])
    return x if x.dim() == 3 else x.permute(1, 2, 0, 3)


def _tokens_back(x: Tensor, dims: int) -> Tensor:
    """Undo :func:`_tokens_second`."""
    return x if dims == 3 else x.permute(2, 0, 1, 3)


def _probe_positions(row: RowLayout, start: int, probe: Probe, drafts: int) -> list[int]:
    """Where the probe rows of a row of the batch stand: text after an image, else its last token."""
    end = row.tokens - (drafts if drafts <= row.trailing_text else 0)
    positions = row.text_positions_after_image() if probe.rows == "text" else []
    positions = [position for position in positions if position < end][-probe.limit :]
    return [start + position for position in positions or [end - 1]]


def _gather_rows(query: Tensor, positions: list[list[int]]) -> tuple[Tensor, list[list[int]]]:
    """Query rows (B, W, Hq, D) at the positions, and where each stands, or -1 where a batch row has fewer."""
    length, width = query.shape[1], max(len(row) for row in positions)
    if all(
        row == list(range(length - len(row), length)) for row in positions
    ):  # the usual prompt: image, then text
        return query[:, length - width :], [[-1] * (width - len(row)) + row for row in positions]
    padded = [row + [-1] * (width - len(row)) for row in positions]
    index = upload(padded, query.device)
    count = upload([len(row) for row in positions], query.device)
    return ops.gather_tokens(query, index, count), padded
