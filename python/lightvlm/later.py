"""A later question to a cache from which tokens were dropped: the conversation is read anew, with the question.

The model computes the embeddings and positions of the new tokens as always. Right before its decoder they are put
behind those of the transcript, the cache is emptied, and the whole is a prompt like any other. What the caller gets
back is cut to the new tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .calls import tokens_of
from .contract.sparse import AttentionPart
from .host import upload
from .layout import PADDING, TEXT, BatchLayout, LayoutError, RowLayout, layout_of
from .prompt import plan_prompt, read_prompt
from .session import Level, Prefill
from .transcript import Transcript

if TYPE_CHECKING:
    from .cache import CompactCache
    from .runtime import Run

_KNOWN = (
    "input_ids",
    "inputs_embeds",
    "position_ids",
    "attention_mask",
    "past_key_values",
    "cache_position",
)
"""Tensors of a decoder's call that a transcript keeps or can make again."""


@dataclass
class Entry:
    """The tokens of one forward, which go into a transcript.

    ids: the call's input_ids, or None.   images: whether it brings image features.
    layout: of the call's own tokens, or None where nobody has asked for it.
    anew: layout of the whole conversation, where the call has it read anew; None: its tokens alone are computed.
    """

    transcript: Transcript
    ids: Tensor | None
    images: bool
    layout: BatchLayout | None = None
    anew: BatchLayout | None = None
    new: int = 0

    def enter(
        self,
        run: Run,
        cache: CompactCache,
        decoder: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        seen: Tensor | str | None,
    ) -> Any:
        """At the decoder: note the new tokens, and where the conversation is read anew put it in their place.

        ``seen`` (B, S, 1 + Ct): what the vision tower showed of them (``tower.py``), where it did.
        """
        if args:
            kwargs = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
            kwargs.update(kwargs.pop("kwargs", {}))
        embeds, positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        if embeds is None:
            embeds = decoder.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
        other = next((name for name in kwargs if name not in _KNOWN and _has_tensors(kwargs[name])), None)
        if other is not None and self.transcript.obstacle is None:
            self.transcript.obstacle = f"the decoder was given {other}, which cannot be given again"
        shown = seen if isinstance(seen, Tensor) else None
        self.transcript.add(self.ids, embeds, positions, self.images, shown)
        if self.anew is None:
            return None
        self.new = embeds.shape[1]
        self.transcript.unfinished = True
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = self.transcript.embeds(decoder.get_input_embeddings(), embeds)  # type: ignore[operator]
        kwargs["position_ids"] = self.transcript.positions()
        kwargs["attention_mask"] = self._mask(kwargs.get("attention_mask"), embeds.device)
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = torch.arange(self.anew.length, device=embeds.device)
        for layer in cache.layers:
            layer.reset()
        cache.begin(run, [row.leftpad for row in self.anew.rows])
        return (), kwargs

    def _mask(self, given: Any, device: torch.device) -> Tensor | None:
        """The 2-D padding mask of the whole conversation; None where there is no padding to hide."""
        assert self.anew is not None
        if isinstance(given, Tensor) and given.shape == self.anew.codes.shape:
            return given
        if not any(row.leftpad for row in self.anew.rows):
            return None
        return upload(self.anew.codes != PADDING, device, torch.bool)

    def leave(self, output: Any, prefill: Prefill | None) -> Any:
        """The model's output, cut to what is left of the new tokens. Text is never reduced, so without new images these
        are the last so many."""
        assert self.anew is not None
        self.transcript.unfinished = False
        first = [_images_before(row, row.tokens - self.new) for row in self.anew.rows]
        levels = prefill.levels if prefill is not None else [Level(self.anew.rows, self.anew.length)]
        left = {level.length: self._left(level, first) for level in reversed(levels)}

        def cut(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(cut(item) for item in x)
            if not isinstance(x, Tensor):
                return x
            dim = x.dim() - 2  # hidden states are (B, M, C), attention weights (B, H, M, N)
            return x.narrow(dim, x.shape[dim] - left[x.shape[dim]], left[x.shape[dim]])

        if isinstance(output, tuple):
            return (cut(output[0]), *(cut(item) if isinstance(item, tuple) else item for item in output[1:]))
        for name in ("last_hidden_state", "hidden_states", "attentions"):
            if output.get(name) is not None:
                output[name] = cut(output[name])
        return output

    def _left(self, level: Level, first: list[int]) -> int:
        """New tokens of the row that has most of them at a level; ``first``: each row's first new image."""
        assert self.anew is not None
        gone = [
            sum(whole.image_sizes[image:]) - sum(row.image_sizes[image:])
            for whole, row, image in zip(self.anew.rows, level.rows, first, strict=True)
        ]
        return self.new - min(gone)


def start(run: Run, cache: CompactCache, inputs: dict[str, Any], layout: BatchLayout) -> None:
    """Begin a transcript with a prompt that an empty cache will hold, if the plan may drop any of it later."""
    part, forward = run.plan.prefill, run._forward
    drops = isinstance(part, AttentionPart) and part.unimportant == "drop"
    cache.transcript = None
    if run._reduces or drops or cache.plan.cache is not None:
        cache.transcript = said = Transcript(run.plan.keep_for_later)
        said.begin_call(inputs, forward.one_logit)
        said.add_kinds(layout.codes, [row.grids for row in layout.rows])
        forward.entry = Entry(said, inputs.get("input_ids"), run._adapter.has_pixels(inputs), layout)


def resume(run: Run, cache: CompactCache, inputs: dict[str, Any]) -> bool:
    """Go on with the transcript of a filled cache; whether the call has the conversation read anew, because its tokens
    are a question to a cache that lacks some of it.

    Raises:
        ValueError: the call has another number of rows than a cache that would be read anew.
    """
    forward, said, tokens = run._forward, cache.transcript, tokens_of(inputs)
    assert said is not None
    if tokens is None:
        return False
    new, images = tokens.shape[1], run._adapter.has_pixels(inputs)
    said.follow(cache.get_seq_length())
    forward.entry = entry = Entry(said, inputs.get("input_ids"), images)
    turn = said.is_turn(inputs, new, forward.drafts, forward.one_logit) and said.dropped
    kinds: BatchLayout | None = None
    if said.obstacle is None and (images or turn):
        try:
            kinds = entry.layout = _kinds(run, inputs, tokens, images)
        except LayoutError as error:
            said.obstacle = f"the conversation cannot be read anew: {error}"
    if not turn:
        if kinds is not None:
            said.add_kinds(kinds.codes, [row.grids for row in kinds.rows])
        return False
    obstacle = said.obstacle if said.obstacle is not None else cache.lacks_room(said.length + new)
    if obstacle is not None:
        run._stats.step_aside(obstacle)
        return False
    if len(tokens) != said.batch_size:
        raise ValueError(f"the call has {len(tokens)} rows, the cache has {said.batch_size}")
    assert kinds is not None
    said.add_kinds(kinds.codes, [row.grids for row in kinds.rows])
    entry.anew = said.layout()
    plan_prompt(run, entry.anew)
    return True


def _kinds(run: Run, inputs: dict[str, Any], tokens: Tensor, images: bool) -> BatchLayout:
    """Layout of new tokens; the device is asked only where images are among them."""
    if images:
        return read_prompt(run._adapter, inputs, None)
    return layout_of(torch.full(tokens.shape[:2], TEXT, dtype=torch.int32))


def _images_before(row: RowLayout, end: int) -> int:
    """Images among the first ``end`` tokens of a row that are not padding."""
    at, images = 0, 0
    for run in row.runs:
        images += run.image is not None and at < end
        at += run.tokens
    return images


def _has_tensors(value: Any) -> bool:
    items = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(item, Tensor) for item in items)
