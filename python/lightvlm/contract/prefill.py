"""Prefill parts: what a method that reduces image tokens says of itself, and what it sees of a batch at a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ..plan import Part, option
from .stages import Stage, keep_count

if TYPE_CHECKING:
    from lightvlm_ext.ops import Selection


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


def numbering(default: str) -> Any:
    """The option ``positions`` of a method that may number tokens anew (:attr:`PrefillPart.positions`)."""
    return option(
        default,
        "tokens that stay keep their positions, or are numbered anew; after a prompt, generated tokens go on from "
        "there, or from the whole prompt's end",
        choices=("keep", "renumber", "renumber_prompt"),
    )
