"""Cache parts: what a method that evicts from the KV cache says of itself, and what it sees of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..host import upload
from ..layout import RowLayout
from ..plan import Part

if TYPE_CHECKING:
    from ..cache_layer import CompactLayer


@dataclass(frozen=True)
class PromptLayer:
    """What the host knows of a prompt in a layer that has just read it. Drafts behind the prompt are left out.

    layer, layers: number of the layer, and depth of the decoder.   length: M.
    rows: what each row's tokens are, where a prefill method may have shortened it.   prompt: tokens that each row had
    before that.
    """

    layer: int
    layers: int
    rows: tuple[RowLayout, ...]
    length: int
    prompt: list[int]

    @property
    def tokens(self) -> list[int]:
        """Tokens of each row."""
        return [row.tokens for row in self.rows]

    @property
    def starts(self) -> list[int]:
        """Padding of each row; rows stand flush right."""
        return [self.length - tokens for tokens in self.tokens]

    def images(self, device: torch.device) -> Tensor:
        """(B, M) bool: image tokens."""
        kinds = torch.zeros(len(self.rows), self.length, dtype=torch.bool)
        for own, row, at in zip(kinds, self.rows, self.starts, strict=True):
            for run in row.runs:
                own[at : at + run.tokens] = run.image is not None
                at += run.tokens
        return upload(kinds, device, torch.bool)


@dataclass(frozen=True)
class PromptInput:
    """What a cache method sees of a layer's attention right after the prompt was read.

    query (B, M, Hq, D), key and value (B, M, Hkv, D): views, after the rotary embedding; not to be kept.
    scale: of the logits; None: D ** -0.5.
    """

    layer: PromptLayer
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None


@dataclass(frozen=True)
class PromptChoice:
    """Tokens of a prompt that a layer keeps.

    index (B, M') or, where heads differ, (B, Hkv, M') int32: places in M, ascending, -1 past the count.
    kept: how many of each row, the same for every head.   tail: so many of the last tokens are among them.
    """

    index: Tensor
    kept: list[int]
    tail: int


class CachePart(Part):
    """Base of what evicts tokens from the cache, while text is generated, right after the prompt was read, or both.

    Subclasses are frozen dataclasses. Those that evict while decoding have ``interval``, ``recent`` and ``rows`` and
    write :meth:`choose`; those that evict from the prompt set ``evicts_prompt`` and write :meth:`observe_prompt` and
    :meth:`choose_prompt`.
    """

    slot = "cache"
    interval: int
    """Generated tokens between two compactions."""
    recent: int
    """Tokens at the end of a row that are never evicted."""
    rows: int
    """Query rows that the cache remembers for scoring."""

    demotes: bool = False
    """With a precision part: whether tokens beyond the budget are stored in 2 bits instead of being dropped."""
    per_head: bool = False
    """Whether each key/value head keeps tokens of its own, as many as the others."""
    evicts_generated: ClassVar[bool] = True
    """Whether anything is evicted while decoding."""
    evicts_prompt: ClassVar[bool] = False
    """Whether anything is evicted from a prompt as soon as all layers have read it."""
    starts_mass: ClassVar[bool] = False
    """Whether what :meth:`observe_prompt` returns, (B, Hkv, M) fp32, is what the tokens have received so far, to which
    decoding adds; needs ``wants_mass``."""

    def budget(self, logical: int) -> int:
        """Tokens of a row that may stay when ``logical`` have been seen; needed where the cache is packed as well."""
        raise NotImplementedError

    @property
    def wants_mass(self) -> bool:
        """Whether scores are the attention that tokens received in the decode pass, added up (``layer.scores(None)``);
        otherwise they come from the remembered queries."""
        return False

    def choose(self, layer: CompactLayer, leftpad: list[int]) -> tuple[Tensor, Tensor, list[int]] | None:
        """What a layer keeps: index (B, M) int32 or, where heads differ, (B, Hkv, M), count (B,) int32 and the counts
        on the host; None: all of it.

        Args:
            layer: the cached keys and the last ``rows`` queries.
            leftpad: padding of each row in the prompt, which the logical length counts.
        """
        raise NotImplementedError

    def tail(self, kept: list[int]) -> int:
        """Tokens at the end of every row that :meth:`choose` left alone, where it kept so many of each."""
        return self.recent

    def observe_prompt(self, prompt: PromptInput) -> Any:
        """What :meth:`choose_prompt` has to know of a layer: scores, never queries of the whole prompt."""
        raise NotImplementedError

    def choose_prompt(self, seen: Sequence[tuple[PromptLayer, Any]]) -> list[PromptChoice | None]:
        """What each layer keeps of the prompt; None: all of it. How much that is, the host must know; where it depends
        on values, they may be read once, for all layers.

        Args:
            seen: for each layer what it is and what :meth:`observe_prompt` returned.
        """
        raise NotImplementedError

    def merge_prompt(
        self, prompt: PromptLayer, choice: PromptChoice, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Keys and values (B, Hkv, M', D) of the tokens that stay, with those that go merged into them; None: as they
        were. key, value (B, M, Hkv, D): all of the layer."""
        return None


class PromptCachePart(CachePart):
    """Base of methods that evict from the prompt alone: generated tokens all stay."""

    interval, recent, rows = 1, 0, 0
    evicts_generated = False
    evicts_prompt = True
