"""What a method is: where it works (stages), how it scores (a probe), and how it reduces.

A prefill method is one file: a frozen dataclass deriving from :class:`PrefillPart`. The runtime calls
    ``stages`` once
per prompt, runs attention, asks for ``probe`` rows at the layer before each stage, and hands ``reduce`` a
:class:`StageInput`. Methods never see models, caches or padding rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lightvlm_ext import ops

from ..host import upload
from ..layout import RowLayout
from ..plan import Part, Plan, option

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
    """Which query rows score which keys, and how their attention is reduced (see ``lightvlm_ext.ops.importance``).

    rows: "text" are the prompt's text tokens that come after an image (at most the last ``limit`` of them), "last" is
        the last token alone, "all" is every token.
    over_rows, over_heads: reductions of the attention that a key receives.
    axis: "key" is attention as the decoder computes it: each row's softmax over the keys it sees. "query" normalises
        each key's logits over the rows, without a causal mask, and scores the rows: what they receive if every key
        spreads mass 1 over them; summed over keys and heads (LightKV's prompt guidance).
    keys: with axis "query", the keys that spread: "text" are all text tokens, before and after the images.
    layer: "before" reads queries and keys of the layer before the stage; "coming" computes those that the stage's own
        layer would have from the tokens as they are, at the price of its key projection.
    """

    rows: Literal["text", "last", "all"] = "text"
    limit: int = 64
    over_rows: Literal["mean", "max", "sum"] = "mean"
    over_heads: Literal["mean", "max", "sum"] = "mean"
    axis: Literal["key", "query"] = "key"
    keys: Literal["all", "text"] = "all"
    layer: Literal["before", "coming"] = "before"


@dataclass(frozen=True)
class TowerProbe:
    """What a method wants to know of the vision tower's attention.

    layer: of the tower, negative ones from its end.
    rows: "class" is the class token's attention to each patch, "mean" the attention that a patch receives from all
        tokens of its image; towers without a class token have the latter in either case.
    keys: whether the layer's keys are wanted, too.
    """

    layer: int = -2
    rows: Literal["class", "mean"] = "class"
    keys: bool = False


@dataclass(frozen=True)
class Picture:
    """Tokens of one image (or video) of a row at a stage; all of it is known on the host.

    image: its number in the row.   start, stop: its tokens' places in the row of M.   original: tokens it had at first.
    keep: tokens that stay.   grid: (frames, height, width) of its original tokens, or None where that is not known.
    """

    image: int
    start: int
    stop: int
    original: int
    keep: int
    grid: tuple[int, int, int] | None = None

    @property
    def tokens(self) -> int:
        """Tokens it has now."""
        return self.stop - self.start


@dataclass(frozen=True)
class StageInput:
    """What a method sees of a batch at a stage. B rows, M tokens, C channels, G images in the row that has
    most.

    Attributes:
        stage: the stage.
        hidden (B, M, C): input of the layer.
        scores (B, M) fp32 or None: what the probe found.
        segment (B, M) int32: number of the image a token belongs to, -1 for text and padding.
        within (B, M) int32: index of an image token in its original image.
        text (B, M) bool: text tokens; they are always kept.
        question (B, M) bool: text tokens that may say what matters: all but the last ones, where these are answers
            that are rated or verified. None stands for ``text``.
        keep (B, G) int32: tokens to keep of each image.
        capacity: tokens of the longest row after the stage.
        pictures: for each row its images: places and counts, on the host.
        keys (B, M, Hkv, D) or None: keys of the probed layer, where the method ``wants_keys``.
        tower_scores (B, M) fp32, tower_keys (B, M, Ct) or None: of the vision tower, where the method has a ``tower``
            probe; 0 for text.
        sizes (B, M) fp32 or None: how many original tokens each token stands for, where the method ``counts_sizes``.
    """

    hidden: Tensor
    scores: Tensor | None
    segment: Tensor
    within: Tensor
    text: Tensor
    keep: Tensor
    capacity: int
    stage: Stage | None = None
    pictures: tuple[tuple[Picture, ...], ...] = ()
    keys: Tensor | None = None
    tower_scores: Tensor | None = None
    tower_keys: Tensor | None = None
    sizes: Tensor | None = None
    question: Tensor | None = None


@dataclass(frozen=True)
class Reduced:
    """A stage's result: which tokens stay, and their hidden states (B, capacity, C), rows flush right.

    sizes (B, capacity) fp32, flush right: where the method ``counts_sizes``, what the tokens stand for now.
    """

    selection: Selection
    hidden: Tensor
    sizes: Tensor | None = None


class PrefillPart(Part):
    """Base of prefill methods. Subclasses are frozen dataclasses with at least a ``keep`` field."""

    slot = "prefill"
    min_image_tokens: int

    wants_keys: ClassVar[bool] = False
    """Whether stages get the keys of the layer that the probe reads."""
    counts_sizes: ClassVar[bool] = False
    """Whether stages get, and return, how many original tokens each token stands for."""
    positions: str = "keep"
    """Positions of the tokens that stay. "keep": as they were. "renumber": 0, 1, 2, ... after a stage, on all axes, and
    tokens that are generated go on from there. "renumber_prompt": the same, but generated tokens have the positions of
    the whole prompt, with a gap. Rows that lose no token keep theirs."""

    def stages(self, layers: int) -> tuple[Stage, ...]:
        """The stages for a decoder of ``layers`` layers, in ascending order; empty keeps everything."""
        raise NotImplementedError

    @property
    def probe(self) -> Probe | None:
        """The rows that score, or None where the method needs no score."""
        return None

    @property
    def tower(self) -> TowerProbe | None:
        """What the method needs of the vision tower's attention, or None."""
        return None

    def counts(self, stage: Stage, pictures: Sequence[Picture]) -> list[int]:
        """How many tokens of each image of a row stay at a stage; ``keep`` of the pictures is not set yet.

        The default is ``stage.keep`` of the original number, rounded (:func:`keep_count`), and never more than there
        are.
        """
        return [min(picture.tokens, keep_count(picture.original, stage.keep)) for picture in pictures]

    def raters(
        self, hidden: Tensor, pictures: Sequence[Sequence[Picture]], ends: Sequence[int]
    ) -> Tensor | None:
        """Which of the probe's rows (B, S) bool may score, decided on the decoder's input (B, S, C); None: all of them.

        pictures: for each row its images.   ends: where each row's question ends; what stands behind it (answers that
        are rated, drafts) must have no say.
        """
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
    prompt_block: int | None = None
    """Tokens of the prompt that share channel scales, a multiple of 64; None: all of a row."""

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


def highest(stage: StageInput, scores: Tensor) -> Selection:
    """The ``stage.keep`` tokens of each image that have the highest scores (B, M), and all text; ties go to the lower
    index."""
    return ops.select(
        scores, keep=stage.keep, forced=stage.text, segment=stage.segment, capacity=stage.capacity
    )


def drop(stage: StageInput, selection: Selection, hidden: Tensor | None = None) -> Reduced:
    """A stage whose other tokens vanish. ``hidden`` (B, M, C): the states to keep some of; None: the stage's own."""
    states = stage.hidden if hidden is None else hidden
    return Reduced(selection, ops.gather_tokens(states, selection.index, selection.count, align="right"))


def shrinking(stage: StageInput) -> Iterator[tuple[int, Picture]]:
    """Each image that loses tokens at a stage, with its row of the batch."""
    for row, pictures in enumerate(stage.pictures):
        for picture in pictures:
            if picture.keep < picture.tokens:
                yield row, picture


def keep_count(tokens: int, keep: float) -> int:
    """Tokens left of an image: max(1, floor(keep * tokens + 1/2))."""
    return max(1, math.floor(keep * tokens + 0.5))


def pyramid_stages(
    layers: int,
    keep: float,
    at: tuple[int, ...] | None,
    fractions: tuple[float, ...] | None,
    default_at: Callable[[int], tuple[int, ...]],
    scored: bool = False,
    first: float = 1.0,
) -> tuple[Stage, ...]:
    """The stages of a pyramid that ends at ``keep``.

    Args:
        layers: depth of the decoder.
        keep: final share of each image's tokens; 1 keeps everything (no stages).
        at: layers before whose input tokens are reduced, ascending; None: ``default_at(layers)``.
        fractions: share kept from each stage on; None: geometric, first * (keep / first) ** (t / T).
        scored: whether the score comes from the layer before a stage, so that there must be one.
        first: share that is left when the pyramid begins.

    Raises:
        ValueError: layers outside the decoder or not ascending, fractions that do not fit or do not end at
            keep.
    """
    if keep >= 1:
        return ()
    at = default_at(layers) if at is None else at
    if not at or list(at) != sorted(set(at)) or at[0] < 0 or at[-1] >= layers:
        raise ValueError(f"layers must be ascending layer numbers within 0..{layers - 1}, got {at}")
    if scored and at[0] == 0:
        raise ValueError("layers must start at 1 or later: the score comes from the layer before")
    if fractions is None:
        fractions = (*tuple(first * (keep / first) ** (t / len(at)) for t in range(1, len(at))), keep)
    if len(fractions) != len(at):
        raise ValueError(f"fractions must have one entry per layer ({len(at)}), got {len(fractions)}")
    if any(not 0 < f <= first for f in fractions) or list(fractions) != sorted(fractions, reverse=True):
        raise ValueError(f"fractions must lie in (0, {first:g}] and not increase, got {fractions}")
    if fractions[-1] != keep:
        raise ValueError(f"the last of fractions must be keep ({keep}), got {fractions[-1]}")
    return tuple(Stage(layer, fraction) for layer, fraction in zip(at, fractions, strict=True))


def scaled_layers(layers: int, published: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers that a paper gives for a decoder of ``depth`` layers, at the same share of ``layers``.

    Each is at least 1, as scores come from the layer before, and above the one before it; those that a shallow decoder
    has no room for are left out.
    """
    return ascending([round(layer * layers / depth) for layer in published], layers)


def ascending(wanted: Sequence[int], layers: int) -> tuple[int, ...]:
    """The layers ``wanted`` in a decoder of ``layers`` layers, each at least 1 and above the one before it; those that
    find no room are left out, but for one."""
    at: list[int] = []
    for layer in wanted:
        at.append(max(layer, at[-1] + 1 if at else 1))
    return tuple(layer for layer in at if layer < layers) or (layers - 1,)


def kept_slots(stages: Sequence[Stage], layers: int) -> float:
    """Share of an image's places (tokens times layers) that is left in a decoder: LightKV's eq. 9."""
    borders = [*(stage.layer for stage in stages), layers]
    shares = (stage.keep * (end - stage.layer) for stage, end in zip(stages, borders[1:], strict=True))
    return (borders[0] + sum(shares)) / layers


def numbering(default: str) -> Any:
    """The option ``positions`` of a method that may number tokens anew (:attr:`PrefillPart.positions`)."""
    return option(
        default,
        "tokens that stay keep their positions, or are numbered anew; after a prompt, generated tokens go on from "
        "there, or from the whole prompt's end",
        choices=("keep", "renumber", "renumber_prompt"),
    )


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
