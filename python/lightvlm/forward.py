"""What is known of one forward of an attached model while it runs."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .contract.precision import PrecisionPart
from .layout import BatchLayout
from .positions import ShiftedTables
from .prompt_eviction import PromptEviction
from .session import Prefill, text_places
from .sparse_attention import SparsePrefill
from .statistics import Timer

if TYPE_CHECKING:
    from .cache import CompactCache
    from .later import Entry


@dataclass(slots=True)
class Forward:
    """One forward of the base model. A run has a new one for every call, so that nothing outlives it.

    drafts: tokens before the last one whose logits are asked for, too: they may be cropped again, or are answers to be
    rated.   one_logit: whether the last token's alone are asked for.
    prompt: whether a prompt is read; otherwise tokens follow those that a cache holds.
    layout: of the prompt, where a plan can work on it.   prefill, sparse, eviction: what the plan does with it.
    cache: the CompactCache that the layers fill and read; None where the model has another, or none.
    watched: whether a plan watches what the cache holds, so that our attention decodes whole layers, too.
    entry: of the transcript, where one is kept.   shifted: rotary tables of tokens after a prompt numbered anew.
    timer, observer: measure the forward, and count the ops called in it.
    """

    drafts: int = 0
    one_logit: bool = False
    prompt: bool = False
    layout: BatchLayout | None = None
    prefill: Prefill | None = None
    sparse: SparsePrefill | None = None
    eviction: PromptEviction | None = None
    cache: CompactCache | None = None
    watched: bool = False
    entry: Entry | None = None
    shifted: ShiftedTables | None = None
    timer: Timer | None = None
    observer: AbstractContextManager[object] | None = None
    _text: list[list[list[int]]] | None = field(default=None, init=False)

    @property
    def sparse_drops(self) -> bool:
        """Whether keys of the tokens that do not attend are dropped."""
        return self.sparse is not None and self.sparse.part.unimportant == "drop"

    def text_places(self, layers: int) -> list[list[list[int]]] | None:
        """For each layer and row, where text stands in the buffer that the prompt filled; None where nobody asks."""
        precision = self.cache.plan.precision if self.cache is not None else None
        if not (isinstance(precision, PrecisionPart) and precision.keep_text) or self.layout is None:
            return None
        if self._text is None:
            self._text = text_places(self.layout, self.prefill, layers)
        return self._text

    def stop_observing(self) -> None:
        """Count no more ops. Harmless when called twice."""
        observer, self.observer = self.observer, None
        if observer is not None:
            with contextlib.suppress(ValueError):  # an interrupted call may have run in another context
                observer.__exit__(None, None, None)
