"""What a method is: where it works (stages), how it scores (a probe), and how it reduces.

A prefill method is one file: a frozen dataclass deriving from :class:`PrefillPart`. The runtime calls
    ``stages`` once
per prompt, runs attention, asks for ``probe`` rows at the layer before each stage, and hands ``reduce`` a
:class:`StageInput`. Methods never see models, caches or padding rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ..plan import Part, Plan

if TYPE_CHECKING:
    from lightvlm_ext.ops import Selection

    from ..cache_layer import CompactLayer


@dataclass(frozen=True)
class Stage:
    """Image tokens are reduced at the input of decoder layer
    ``layer`` to ``keep`` of their original number."""

    layer: int
    keep: float


@dataclass(frozen=True)
class Probe:
    """Which query rows score the keys, and how their attention is reduced (see
    ``lightvlm_ext.ops.importance``).

    ``rows``: "text" are the prompt's text tokens that come after an image (at most the last ``limit`` of them),
    "last" is the last token alone.
    """

    rows: Literal["text", "last"] = "text"
    limit: int = 64
    over_rows: Literal["mean", "max", "sum"] = "mean"
    over_heads: Literal["mean", "max", "sum"] = "mean"


@dataclass(frozen=True)
class StageInput:
    """What a method sees of a batch at a stage. B rows, M tokens, C channels, G images in the row that has
    most.

    Attributes:
        hidden (B, M, C): input of the layer.
        scores (B, M) fp32 or None: attention that each token received from the probe rows in the layer
            before.
        segment (B, M) int32: number of the image a token belongs to, -1 for text and padding.
        within (B, M) int32: index of an image token in its original image.
        text (B, M) bool: text tokens; they are always kept.
        keep (B, G) int32: tokens to keep of each image.
        capacity: tokens of the longest row after the stage.
    """

    hidden: Tensor
    scores: Tensor | None
    segment: Tensor
    within: Tensor
    text: Tensor
    keep: Tensor
    capacity: int


@dataclass(frozen=True)
class Reduced:
    """A stage's result: which tokens stay, and their hidden states (B, capacity, C), rows flush right."""

    selection: Selection
    hidden: Tensor


class PrefillPart(Part):
    """Base of prefill methods. Subclasses are frozen dataclasses with at least a ``keep`` field."""

    slot = "prefill"
    min_image_tokens: int

    def stages(self, layers: int) -> tuple[Stage, ...]:
        """The stages for a decoder of ``layers`` layers, in ascending order; empty keeps everything."""
        raise NotImplementedError

    @property
    def probe(self) -> Probe | None:
        """The rows that score, or None where the method needs no score."""
        return None

    def reduce(self, stage: StageInput) -> Reduced:
        """Choose and merge or drop the image tokens of a stage."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionScores:
    """What a method sees of a layer's attention at prefill. B rows of S tokens, padding on the left.

    Attributes:
        mass (B, S) fp32: attention that each token received from the probe rows: summed over them, mean over heads.
        visible (B, S) int32: how many probe rows can see the token.
        valid (B, S) bool: tokens that are not padding.
        forced (B, S) bool: tokens that attend in any case.
    """

    mass: Tensor
    visible: Tensor
    valid: Tensor
    forced: Tensor


class AttentionPart(Part):
    """Base of methods under which only some tokens attend, chosen in every layer anew; all tokens go through all
    layers. Subclasses are frozen dataclasses with at least these fields."""

    slot = "prefill"
    min_tokens: int
    """Step aside where the longest row of a prompt is shorter."""
    unimportant: str
    """What becomes of the others' keys and values after the prompt: "keep" or "drop"."""
    full_layers: int
    """First layers, in which all tokens attend."""

    def probe_rows(self, tokens: int) -> list[int]:
        """The query rows that score, ascending, in a prompt of so many tokens."""
        raise NotImplementedError

    def choose(self, scores: AttentionScores) -> Selection:
        """The tokens that attend, per row; their number may be known to the device alone."""
        raise NotImplementedError


class CachePart(Part):
    """Base of decode-time policies. Subclasses are frozen dataclasses with at least these three fields."""

    slot = "cache"
    interval: int
    """Generated tokens between two compactions."""
    recent: int
    """Tokens at the end of a row that are never evicted."""
    rows: int
    """Query rows that the cache remembers for scoring."""

    demotes: bool = False
    """With a precision part: whether tokens beyond the budget are stored in 2 bits instead of being dropped."""

    def budget(self, logical: int) -> int:
        """Tokens of a row that may stay when ``logical`` have been seen; needed where the cache is packed as well."""
        raise NotImplementedError

    @property
    def wants_mass(self) -> bool:
        """Whether scores are the attention that tokens received in the decode pass, added up (``layer.scores(None)``);
        otherwise they come from the remembered queries."""
        return False

    def choose(self, layer: CompactLayer, leftpad: list[int]) -> tuple[Tensor, Tensor, list[int]] | None:
        """What a layer keeps: index (B, M) int32, count (B,) int32 and the counts on the host; None: all of it.

        Args:
            layer: the cached keys and the last ``rows`` queries.
            leftpad: padding of each row in the prompt, which the logical length counts.
        """
        raise NotImplementedError


class PrecisionPart(Part):
    """Base of what says in how many bits a cache is stored. Subclasses are frozen dataclasses with these fields."""

    slot = "precision"
    sinks: int
    """First tokens of a row that stay in 16 bits."""
    recent: int
    """Last tokens of a row that do."""
    interval: int
    """Generated tokens that are packed at a time, a multiple of 64."""
    keep_text: bool
    """Whether the prompt's text stays in 16 bits."""

    def levels(self, layer: int, layers: int) -> tuple[int, ...]:
        """Bits of a layer's important tokens, and, where they differ, of the others; () leaves the layer as it is."""
        raise NotImplementedError

    @property
    def separates(self) -> bool:
        """Whether important tokens get other bits than the rest."""
        raise NotImplementedError

    def important(self, scores: Tensor) -> Tensor:
        """How many (R,) int32 of so many generated tokens (R, N) are important, by the attention they receive."""
        raise NotImplementedError


def keep_count(tokens: int, keep: float) -> int:
    """Tokens left of an image: max(1, floor(keep * tokens + 1/2))."""
    return max(1, math.floor(keep * tokens + 0.5))


def pyramid_stages(
    layers: int,
    keep: float,
    at: tuple[int, ...] | None,
    fractions: tuple[float, ...] | None,
    default_at: Callable[[int], tuple[int, ...]],
) -> tuple[Stage, ...]:
    """The stages of a pyramid that ends at ``keep``.

    Args:
        layers: depth of the decoder.
        keep: final share of each image's tokens; 1 keeps everything (no stages).
        at: layers before whose input tokens are reduced, ascending; None: ``default_at(layers)``.
        fractions: share kept from each stage on; None: geometric, keep ** (t / T).

    Raises:
        ValueError: layers outside the decoder or not ascending, fractions that do not fit or do not end at
            keep.
    """
    if keep >= 1:
        return ()
    at = default_at(layers) if at is None else at
    if not at or list(at) != sorted(set(at)) or at[0] < 0 or at[-1] >= layers:
        raise ValueError(f"layers must be ascending layer numbers within 0..{layers - 1}, got {at}")
    if fractions is None:
        fractions = (*tuple(keep ** (t / len(at)) for t in range(1, len(at))), keep)
    if len(fractions) != len(at):
        raise ValueError(f"fractions must have one entry per layer ({len(at)}), got {len(fractions)}")
    if any(not 0 < f <= 1 for f in fractions) or list(fractions) != sorted(fractions, reverse=True):
        raise ValueError(f"fractions must lie in (0, 1] and not increase, got {fractions}")
    if fractions[-1] != keep:
        raise ValueError(f"the last of fractions must be keep ({keep}), got {fractions[-1]}")
    return tuple(Stage(layer, fraction) for layer, fraction in zip(at, fractions, strict=True))


def check_keep(keep: float) -> None:
    """Raise unless keep is a number in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"keep must be a number in (0, 1], got {keep!r}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")


KEEPS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.06, 0.03)
"""Shares that benchmarks try of methods that keep one."""


@dataclass(frozen=True)
class Method:
    """A registered method: its name, the function that makes its plan, and where it comes from.

    knob: the option that says how much is left to do.   levels: values of it that benchmarks try.
    """

    name: str
    make: Callable[..., Plan]
    source: str
    knob: str = "keep"
    levels: tuple[float, ...] = KEEPS
