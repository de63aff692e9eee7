"""The vision tower's attention, for prefill methods that choose by it.

While a run with such a method is attached, one layer of the tower uses our attention function: the model's own, which
also scores the patches. Patches become image tokens as the model joins them. What was read waits for the decoder's
input: forward() runs the tower inside the base model's call, generate() of newer transformers before it, and then it
travels with the tower's output, so that no other call can take it for its own.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightvlm_ext import ops

from . import attention_hook
from .contract.prefill import TowerProbe
from .host import rectangular, upload
from .layout import FIRST_IMAGE, BatchLayout, Grid
from .models.base import Adapter

_ENCODED = "the images came in already encoded, without the vision tower's attention that the plan needs"
_MIXED = "images and videos came in one prompt, whose order the vision tower does not know"
_OTHER = "the vision tower's images are not those of the prompt"


@dataclass(frozen=True)
class Seen:
    """What one call of the tower showed.

    data (T, 1 + Ct) fp32: score and key of every image token, picture after picture; Ct is 0 where the keys are not
    asked for.   sizes: tokens of each picture.   source: the probe, and the layer it was read from.
    """

    data: Tensor
    sizes: tuple[int, ...]
    source: tuple[TowerProbe, int]


class Tower:
    """Reads one layer of a model's vision tower.

    Scores are attention as the layer computes it (softmax over all its tokens, the class token included, logits scaled
    as the layer scales them), mean over heads, in fp32: of the class token to each patch, or what a patch receives,
    mean over all tokens of its picture. Keys are what attention gets, rotated where the tower rotates them, mean over
    heads. Where the model joins patches into a token, the token has their mean. ``own_work`` is around what this costs.

    Raises:
        ValueError: a tower that is built otherwise than the family's, or a layer that it does not have.
    """

    def __init__(
        self,
        adapter: Adapter,
        probe: TowerProbe,
        own_work: Callable[[torch.device], AbstractContextManager[None]],
    ) -> None:
        self._adapter, self._probe, self._own_work = adapter, probe, own_work
        attentions = adapter.tower_attentions()
        if not -len(attentions) <= probe.layer < len(attentions):
            raise ValueError(
                f"plan reads layer {probe.layer} of the vision tower, which has {len(attentions)} layers"
            )
        self._attention: Any = attentions[adapter.tower_layer(probe.layer % len(attentions))]
        self._by_class = probe.rows == "class" and adapter.tower_has_class_token
        self._signature = inspect.signature(adapter.tower.forward)
        self._config: Any = self._attention.config
        self._handles: list[Any] = []
        self._grids: list[Grid] | None = None
        self._chunks: list[Tensor] = []
        self._encoded: list[Any] = []
        self._calls: list[Seen] | None = None

    @property
    def _source(self) -> tuple[TowerProbe, int]:
        return self._probe, id(self._attention)

    # -- on the model

    def put_on(self) -> None:
        """Set the hooks that :meth:`take_off` takes off; the tower's other layers are not touched."""
        own = copy.copy(self._config)
        own._attn_implementation = attention_hook.register(self._config._attn_implementation or "eager")
        self._attention.config = own
        self._attention.__dict__["_lightvlm_run"] = self
        tower = self._adapter.tower
        self._handles = [
            tower.register_forward_pre_hook(self._before, with_kwargs=True),
            tower.register_forward_hook(self._after, always_call=True),
        ]

    def take_off(self) -> None:
        """Restore the tower."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        del self._attention._lightvlm_run
        self._attention.config = self._config

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's attention. query, key, value (n, H, S, D); returns (n, S, H, D)."""
        own, module.config = module.config, self._config  # some implementations look their name up there
        try:
            call = attention_hook.original_function(module, self._config._attn_implementation or "eager")
            found: tuple[Tensor, Tensor | None] = call(module, query, key, value, mask, **kwargs)
        finally:
            module.config = own
        lengths = [query.shape[2]]
        if (
            self._grids is not None and kwargs.get("cu_seq_lens_q") is not None
        ):  # all frames of all pictures at once
            lengths = [rows * columns for frames, rows, columns in self._grids for _ in range(frames)]
        if sum(lengths) == query.shape[2]:
            pairs = zip(query.detach().split(lengths, 2), key.detach().split(lengths, 2), strict=True)
            with self._own_work(query.device):
                self._chunks += [self._measure(q, k, kwargs.get("scaling")) for q, k in pairs]
        return found

    def _measure(self, query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        """Score and key of each token: (n, S, 1 + Ct) fp32, of tokens that attend to each other."""
        rows, keys = query.transpose(1, 2), key.transpose(1, 2)
        scores = ops.importance(rows[:, :1] if self._by_class else rows, keys, scale=scale, causal=False)
        if not self._probe.keys:
            return scores[..., None]
        return torch.cat([scores[..., None], keys.float().mean(2)], dim=-1)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._chunks = []
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        self._grids = self._adapter.tower_grids(inputs)  # the tower reads them on the host, too

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        chunks, self._chunks = self._chunks, []
        grids, self._grids = self._grids, None
        if not chunks or output is None:
            return
        with self._own_work(chunks[0].device):
            seen = self._join(chunks, grids)
        if seen is None:
            return
        if hasattr(output, "pooler_output"):
            output.__dict__["_lightvlm_seen"] = seen
        if self._calls is not None:
            self._calls.append(seen)

    def _join(self, chunks: list[Tensor], grids: list[Grid] | None) -> Seen | None:
        """What all chunks together say of the image tokens; None where they are not all of the pictures."""
        if grids is None:
            tokens = self._adapter.tower_tokens(torch.cat(chunks), None)
            sizes = (tokens.shape[1],) * len(tokens)
            return Seen(tokens.flatten(0, 1), sizes, self._source)
        patches = torch.cat([chunk[0] for chunk in chunks])
        counts = [frames * rows * columns for frames, rows, columns in grids]
        if sum(counts) != len(patches):
            return None
        parts = []
        for part, grid in zip(patches.split(counts), grids, strict=True):
            # a frame's tokens attend to no other's, so of all tokens of a video each patch is seen by one in so many
            part[:, 0] /= grid[0]
            parts.append(self._adapter.tower_tokens(part, grid))
        return Seen(torch.cat(parts), tuple(len(part) for part in parts), self._source)

    # -- in a call of the base model

    def begin_call(self, encoded: list[Any]) -> None:
        """A call of the base model begins, with these outputs of the tower among its inputs."""
        self._encoded, self._calls = encoded, []

    def end_call(self) -> None:
        """Forget what was seen in the call."""
        self._encoded, self._calls = [], None

    def read(self, layout: BatchLayout, device: torch.device) -> Tensor | str:
        """What was seen of the call's images: (B, S, 1 + Ct) fp32 at the tokens of their layout, 0 for text; or why
        nothing that fits was."""
        if self._encoded:
            found = [getattr(output, "_lightvlm_seen", None) for output in self._encoded]
        else:
            found = [*(self._calls or ())]
        if len(found) > 1:
            return _MIXED
        seen = found[0] if found else None
        if seen is None or seen.source != self._source:
            return _ENCODED
        numbers = match_pictures(seen.sizes, [row.image_sizes for row in layout.rows])
        return _OTHER if numbers is None else place(seen, numbers, layout, device)


def match_pictures(sizes: tuple[int, ...], rows: list[tuple[int, ...]]) -> list[list[int]] | None:
    """Which picture each image of each row is; None where numbers or sizes differ.

    ``sizes``: tokens of the pictures; ``rows``: of the images of every row. Pictures come in the order of the rows.
    generate() repeats each row (beams) after the tower has run: then a group of rows has the same pictures.
    """
    total = sum(map(len, rows))
    if not sizes or not total or total % len(sizes):
        return None
    repeats, at = total // len(sizes), 0
    if len(rows) % repeats:
        return None
    numbers = []
    for row in range(0, len(rows), repeats):
        group = list(range(at, at + len(rows[row])))
        at += len(group)
        for image_sizes in rows[row : row + repeats]:
            if image_sizes != tuple(sizes[number] for number in group if number < len(sizes)):
                return None
            numbers.append(group)
    return numbers if at == len(sizes) else None


def place(seen: Seen, numbers: list[list[int]], layout: BatchLayout, device: torch.device) -> Tensor:
    """What was seen, (B, S, 1 + Ct), at the image tokens of a layout, and 0 elsewhere."""
    starts = [0, *itertools.accumulate(seen.sizes)]
    offsets = torch.tensor(rectangular([[starts[n] for n in row] for row in numbers]))
    codes = layout.codes.long()
    image = (codes - FIRST_IMAGE).clamp_min(0)
    index = torch.where(codes >= FIRST_IMAGE, 1 + offsets.gather(1, image) + layout.within, 0)
    data = nn.functional.pad(seen.data.to(device), (0, 0, 1, 0))
    found = data.index_select(0, upload(index.flatten(), device, torch.int64))
    return found.unflatten(0, index.shape)
