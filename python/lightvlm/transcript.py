"""Transcript: what a conversation said, so that it can be read anew when a later question is asked.

A plan drops what the question at hand does not look at. The transcript of a cache keeps what is needed to read
everything once more: the decoder's input embeddings of every call that brought images (or embeddings), on the host or
in 8 bits, and the ids of all other tokens, which are embedded again; the positions of all; and where the images are, on
the CPU. A token costs C * 2 bytes in 16 bits where it is held as an embedding, and 16 to 32 bytes where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .host import download
from .layout import FIRST_IMAGE, TEXT, BatchLayout, Grid, layout_of
from .plan import KeepForLater

_ROOM = 128
"""Free places that a growing buffer starts with."""


@dataclass(frozen=True)
class _Held:
    """Embeddings of consecutive tokens: ``states`` (B0, T, C), in int8 with a ``scale`` (B0, T, 1) fp32 a token, or as
    they were; never written again, so that copies of a cache share them.

    ``images``: whether image features are among them.   ``seen`` (B0, T, 1 + Ct) fp32: what the vision tower showed of
    those, exactly in any case; None where nobody asked, or it did not.

    ``rows`` (B,): the row of ``states`` that each row of the batch has, on the device; None: its own. Beams change
    places at every token, which must not move what is on the host.
    """

    start: int
    tokens: int
    states: Tensor
    scale: Tensor | None
    rows: Tensor | None = None
    images: bool = False
    seen: Tensor | None = None

    @classmethod
    def of(cls, start: int, embeds: Tensor, keep: KeepForLater, images: bool, seen: Tensor | None) -> _Held:
        if keep == "offload":
            shown = None if seen is None else download(seen)
            return cls(start, embeds.shape[1], download(embeds), None, images=images, seen=shown)
        exact = embeds.float()
        scale = exact.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        states = (exact / scale).round().to(torch.int8)
        return cls(start, embeds.shape[1], states, scale, images=images, seen=seen)

    def embeds(self, like: Tensor) -> Tensor:
        # whole, then cut: a part of a pinned buffer would be copied by the host, before it is there
        states = self.states.to(like.device, non_blocking=True)[:, : self.tokens]
        if self.scale is not None:
            states = (states.float() * self.scale[:, : self.tokens]).to(like.dtype)
        return states if self.rows is None else states.index_select(0, self.rows)

    def shown(self, device: torch.device) -> Tensor:
        """``seen`` (B, tokens, 1 + Ct) on a device."""
        assert self.seen is not None
        seen = self.seen.to(device, non_blocking=True)[:, : self.tokens]
        return seen if self.rows is None else seen.index_select(0, self.rows.to(device))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.states, self.scale, self.seen) if x is not None)


class Transcript:
    """The conversation that a cache holds, or has dropped tokens of. Public attributes:

    keep: "offload", "quantize", or "drop", which keeps nothing and only tells turns from decoding;
    length: tokens so far, padding included;
    dropped: whether the cache lacks tokens that a later question might look at;
    obstacle: why the conversation cannot be read anew, or None;
    unfinished: whether a call that read it anew did not get to its end.
    """

    def __init__(self, keep: KeepForLater) -> None:
        self.keep = keep
        self.length = 0
        self.dropped = self.unfinished = False
        self.obstacle: str | None = None
        if keep == "drop":
            self.obstacle = (
                "a later question was asked of a cache from which tokens were dropped (keep_for_later='drop')"
            )
        self._ids = self._positions = torch.empty(0)
        self._held: list[_Held] = []
        self._codes: Tensor | None = None
        self._grids: list[list[Grid | None]] = []
        self._code_rows: Tensor | None = None
        self._call: tuple[Any, ...] = ()

    # -- turns

    def is_turn(self, inputs: dict[str, Any], new: int, drafts: int, one_logit: bool) -> bool:
        """Whether a call on the filled cache is a later question, and not decoding, drafts or a chunk of a prompt.

        One new token is decoding, and so are ``drafts`` more whose logits are asked for. A chunk comes from
        ``generate(prefill_chunk_size=...)`` right after the chunk before it: both ask for one logit, and their
        positions or masks are slices of the same tensor, which two calls of generate() never share.
        """
        if new <= drafts + 1:
            self._call = ()
            return False
        before = self._call
        self.begin_call(inputs, one_logit)
        return not any(_share_memory(a, b) for a, b in zip(before, self._call, strict=False))

    def begin_call(self, inputs: dict[str, Any], one_logit: bool) -> None:
        """Remember what the next call is compared with, if it may be the next chunk of this one."""
        self._call = (inputs.get("position_ids"), inputs.get("attention_mask")) if one_logit else ()

    # -- what was said

    def add(
        self,
        ids: Tensor | None,
        embeds: Tensor,
        positions: Tensor | None,
        images: bool,
        seen: Tensor | None = None,
    ) -> None:
        """Add the tokens of a call: embeds (B, S, C), positions (B, S) or (axes, B, S), as the decoder gets them.

        ``ids`` (B, S): None where the call brought embeddings. ``images``: whether features were put among them.
        ``seen`` (B, S, 1 + Ct) fp32: what the vision tower showed of the images.
        """
        if self.keep == "drop":
            return
        batch, new = embeds.shape[:2]
        start, self.length = self.length, self.length + new
        if ids is None or images:
            own = (
                embeds.detach() if images else embeds.detach().clone()
            )  # the caller's, who may write to them
            self._held.append(_Held.of(start, own, self.keep, images, seen))
            ids = embeds.new_zeros(batch, new, dtype=torch.long)
        if positions is None:  # the decoder counts itself
            positions = torch.arange(start, self.length, device=embeds.device)[None]
        positions = (
            positions[None] if positions.dim() == 2 else positions[-3:]
        )  # a fourth axis in front is a mask's
        axes = max(len(positions), len(self._positions)) if start else len(positions)
        if start and axes > len(self._positions):
            self._positions = self._positions.expand(axes, -1, -1)
            self._positions = _with_room(self._positions, start, self._positions.shape[-1])
        if not start or self.length > self._ids.shape[-1]:
            room = max(2 * start, self.length + _ROOM)
            first = positions.expand(axes, batch, new)
            self._ids = _with_room(self._ids if start else ids, start, room)
            self._positions = _with_room(self._positions if start else first, start, room)
        self._ids[:, start : self.length] = ids
        self._positions[:, :, start : self.length] = positions

    def add_decoded(self, ids: Tensor, after: Tensor) -> None:
        """Add the ids (B, S) of tokens that were decoded one by one; ``after`` (B, 1) or (axes, B, 1): the position
        behind the last of them."""
        self._call, new = (), ids.shape[1]
        positions = after - new + torch.arange(new, device=ids.device)
        self.add(ids, ids[..., None], positions.expand(*positions.shape[:-2], *ids.shape), False)

    def add_kinds(self, new: Tensor, grids: Sequence[Sequence[Grid | None]]) -> None:
        """Say what the tokens are that :meth:`add` will add next: codes (B, S) int32 on the CPU (see ``layout``), the
        images numbered from the first, and the images' grids for each row. Where rows have changed places, the device
        is asked how."""
        if self.keep == "drop":
            return
        if self._codes is None:
            self._codes, self._grids = new, [list(row) for row in grids]
            return
        if self._code_rows is not None:
            rows = self._code_rows.cpu()
            self._codes, self._code_rows = self._codes[rows], None
            self._grids = [self._grids[row] for row in rows.tolist()]
        self._grids = [
            [*had[: _images(codes)], *more]
            for had, codes, more in zip(self._grids, self._codes[:, : self.length], grids, strict=True)
        ]
        before = self._codes[:, : self.length]
        if self.length > before.shape[1]:
            text = before.new_full((len(before), self.length - before.shape[1]), TEXT)
            before = torch.cat([before, text], dim=1)
        images = (before.amax(1, keepdim=True) - FIRST_IMAGE + 1).clamp_min(0)
        self._codes = torch.cat([before, torch.where(new >= FIRST_IMAGE, new + images, new)], dim=1)

    def layout(self) -> BatchLayout:
        """Where the images of the whole conversation are, right after :meth:`add_kinds`."""
        assert self._codes is not None
        return layout_of(self._codes, self._grids)

    def embeds(self, embed: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """Input embeddings (B, length, C) of the whole conversation, in the dtype and on the device of ``like``;
        ``embed`` embeds ids."""
        parts, at = [], 0
        for held in self._held:
            if held.start > at:
                parts.append(embed(self._ids[:, at : held.start]))
            parts.append(held.embeds(like))
            at = held.start + held.tokens
        if at < self.length:
            parts.append(embed(self._ids[:, at : self.length]))
        return torch.cat(parts, dim=1)

    def seen(self, device: torch.device) -> Tensor | None:
        """What the vision tower showed of the whole conversation (B, length, 1 + Ct), 0 for text; None where it did not
        show all of the images."""
        found: Tensor | None = None
        for held in self._held:
            end = held.start + held.tokens
            if held.seen is not None:
                shown = held.shown(device)
                if found is None:
                    found = shown.new_zeros(len(shown), self.length, shown.shape[-1])
                found[:, held.start : end] = shown
            elif held.images:
                return None
        return found

    def positions(self) -> Tensor:
        """position_ids (B, length), or (3, B, length) with M-RoPE."""
        found = self._positions[:, :, : self.length]
        return found[0] if len(found) == 1 else found

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self._ids.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes kept, wherever they are."""
        return sum(held.nbytes for held in self._held) + self._ids.nbytes + self._positions.nbytes

    # -- what happens to a cache

    def follow(self, seen: int) -> None:
        """Go back to the first ``seen`` tokens, as the cache has (after a crop, or a call that failed)."""
        if self.keep == "drop":
            return
        if seen > self.length:
            self.obstacle = (
                "a later question was asked of a cache that was filled while no run was attached, too"
            )
            return
        self.length = seen
        held = [one for one in self._held if one.start < seen]
        self._held = [replace(one, tokens=min(one.tokens, seen - one.start)) for one in held]
        if self._codes is not None:
            self._codes = self._codes[:, :seen]

    def select_rows(self, indices: Tensor) -> None:
        """Take the rows ``indices`` (B',) of the batch, in that order; asks the device nothing."""
        if self.keep == "drop" or not self.length:
            return
        rows = indices.to(self._ids.device)
        with torch.inference_mode(False):  # as in _with_room
            self._ids = self._ids.index_select(0, rows)
            self._positions = self._positions.index_select(1, rows)
        self._held = [
            replace(one, rows=rows if one.rows is None else one.rows.index_select(0, rows))
            for one in self._held
        ]
        self._code_rows = rows if self._code_rows is None else self._code_rows.index_select(0, rows)

    # -- in a file

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All of it, as JSON-ready data and tensors."""
        if self._ids.device.type == "cuda":  # what is on its way to the host has to get there
            torch.cuda.synchronize(self._ids.device)
        tensors: dict[str, Tensor] = {}
        if self.length:
            tensors["ids"] = self._ids[:, : self.length]
            tensors["positions"] = self._positions[:, :, : self.length]
        grids = self._grids
        if self._codes is not None:
            tensors["codes"] = self._codes
            if self._code_rows is not None:
                rows_now = self._code_rows.cpu()
                tensors["codes"], grids = self._codes[rows_now], [grids[row] for row in rows_now.tolist()]
        held = []
        for number, one in enumerate(self._held):
            rows = slice(None) if one.rows is None else one.rows.to(one.states.device)
            tensors[f"held.{number}"] = one.states[rows]
            if one.scale is not None:
                tensors[f"scale.{number}"] = one.scale[rows]
            if one.seen is not None:
                tensors[f"seen.{number}"] = one.seen[
                    slice(None) if one.rows is None else one.rows.to(one.seen.device)
                ]
            held.append([one.start, one.tokens, one.images])
        about = {"keep": self.keep, "length": self.length, "dropped": self.dropped, "obstacle": self.obstacle}
        return {**about, "held": held, "grids": grids}, tensors

    @classmethod
    def from_state(
        cls, about: dict[str, Any], tensors: dict[str, Tensor], device: str | torch.device
    ) -> Transcript:
        """What :meth:`state` gave, for a cache on a device; tensors on the CPU."""
        own = cls(about["keep"])
        own.length, own.dropped, own.obstacle = about["length"], about["dropped"], about["obstacle"]
        if "ids" in tensors:
            own._ids, own._positions = tensors["ids"].to(device), tensors["positions"].to(device)
        own._codes = tensors.get("codes")
        own._grids = [[None if grid is None else tuple(grid) for grid in row] for row in about["grids"]]
        for number, (start, tokens, images) in enumerate(about["held"]):
            states, scale, seen = (tensors.get(f"{name}.{number}") for name in ("held", "scale", "seen"))
            assert states is not None
            if scale is not None:  # in 8 bits it stays on the device
                states, scale = states.to(device), scale.to(device)
                seen = None if seen is None else seen.to(device)
            own._held.append(_Held(start, tokens, states, scale, images=images, seen=seen))
        return own

    def __deepcopy__(self, memo: dict[int, Any]) -> Transcript:
        """A copy that goes on by itself; what is held of the past is shared."""
        own = Transcript(self.keep)
        own.__dict__.update(self.__dict__)
        with torch.inference_mode(False):
            own._ids, own._positions = self._ids.clone(), self._positions.clone()
        own._held, own._call = list(self._held), ()
        own._grids = [list(row) for row in self._grids]
        return own


def _images(codes: Tensor) -> int:
    """Images among tokens of these codes (S,)."""
    return max(0, int(codes.amax()) - FIRST_IMAGE + 1) if codes.numel() else 0


def _with_room(x: Tensor, used: int, room: int) -> Tensor:
    """A buffer (..., room) with the first ``used`` of x (..., N)."""
    with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
        buffer = torch.zeros((*x.shape[:-1], room), dtype=x.dtype, device=x.device)
    buffer[..., :used] = x[..., :used]
    return buffer


def _share_memory(a: Any, b: Any) -> bool:
    """Whether two tensors are parts of one."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    at = a.untyped_storage().data_ptr()
    return at != 0 and at == b.untyped_storage().data_ptr()
