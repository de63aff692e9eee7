"""attach: put a plan on a model, and take it off again.

Two hook points do everything. The text decoder's attention is set to our registered function, which sees
queries and keys after the rotary embedding; and a forward pre-hook on every decoder layer shortens hidden
states, rotary tables and positions together. ``detach`` restores the model bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightvlm_ext import device_errors

from . import attention_hook, decoder_attention, hooks
from .contract.precision import PrecisionPart
from .contract.prefill import PrefillPart
from .contract.sparse import AttentionPart
from .flops import head_width
from .forward import Forward
from .models import find_adapter
from .models.base import Adapter
from .packing import check_storage
from .plan import Plan
from .probing import check_look_ahead
from .prompt_eviction import check_eviction
from .report import Report
from .statistics import Statistics
from .tower import Tower

if TYPE_CHECKING:
    from .cache import CompactCache
    from .cache_layer import CompactLayer
    from .kl import Divergence


def attach(model: nn.Module, plan: Plan, *, trace: bool = False) -> Run:
    """Put a plan on a model.

    Args:
        model: a VLM of transformers of a family that lightvlm knows (``lightvlm doctor`` lists them).
        plan: what to do, from a method such as :func:`lightvlm.LightVLM`.
        trace: remember which image tokens each stage kept (:attr:`Run.kept`), for pictures; it reads the
            device.

    Returns:
        A handle, also a context manager: ``with lightvlm.attach(model, plan) as run: model.generate(...)``.
        ``forward()`` works too; where image tokens are reduced, ``logits`` and ``hidden_states`` get shorter:
        row b's last token stays last, and its tokens stand flush right. ``past_key_values`` of the output is
        the cache to go on with; an empty ``DynamicCache`` that was passed becomes it. Where the logits of the
        last k > 1 tokens are asked for (``logits_to_keep=k``), those after the first of them are answers to be
        rated or drafts to be verified, and have no say in which image tokens stay.
        In chunked prefill (``prefill_chunk_size``) only the first chunk is reduced, as a prompt of its own. Several
        tokens on a filled cache are a later question: where tokens were dropped, the conversation is read anew with
        it, unless the plan's ``keep_for_later`` is "drop" (docs/multi-turn.md); one token alone is decoding. Eager
        attention returns its weights for the layers before the first stage.

    Raises:
        TypeError: model or plan of the wrong kind, or a model class that lightvlm does not know.
        ValueError: the model is attached already, or its decoder cannot take the plan; nothing is changed.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a lightvlm.Plan, got {type(plan).__name__}")
    adapter = find_adapter(model)
    if any(hasattr(attention, "_lightvlm_run") for attention in adapter.attentions):
        raise ValueError("model is attached already; detach the other run first")
    _check_precision(plan, adapter)
    check_eviction(plan)
    attention_hook.check_implementation(adapter.decoder.config._attn_implementation)
    _check_stages(plan, adapter)
    return Run(adapter, plan, trace)


def _check_stages(plan: Plan, adapter: Adapter) -> None:
    """Refuse a plan whose stages come where the decoder cannot take them."""
    part = plan.prefill
    if not isinstance(part, PrefillPart):
        return
    stages = part.stages(len(adapter.layers))
    if stages and stages[0].layer < adapter.first_layer:
        raise ValueError(
            f"plan reduces tokens at layer {stages[0].layer}; {type(adapter.model).__name__} allows it from layer "
            f"{adapter.first_layer} on"
        )
    if part.probe is not None and part.probe.layer == "coming":
        for stage in stages:
            check_look_ahead(adapter.layers[stage.layer])


def _check_precision(plan: Plan, adapter: Adapter) -> None:
    """Refuse a plan whose precision part does not fit the model or the other parts."""
    part = plan.precision
    if isinstance(part, PrecisionPart) and part.separates:
        if not isinstance(plan.prefill, AttentionPart):
            raise ValueError(
                "plan.precision has low_bits, which needs a prefill part that says what is important (zipvl)"
            )
        if plan.prefill.unimportant == "drop":
            raise ValueError("plan.precision has low_bits, but plan.prefill drops the tokens they are for")
    check_storage(plan, head_width(adapter))


class Run:
    """A plan at work on a model; made by :func:`attach`."""

    def __init__(self, adapter: Adapter, plan: Plan, trace: bool = False) -> None:
        self.plan = plan
        self.kept: dict[int, list[list[list[int]]]] = {}
        """With ``trace``: stage's layer -> row -> image -> indices of the kept tokens, of the last prompt."""
        self._trace = trace
        self._adapter = adapter
        self._signature = inspect.signature(adapter.base.forward)
        self._forward, self._coming = Forward(), Forward()
        """The one under way, else an empty one; and the base's next, as far as the head knows what is asked for."""
        self._stats = Statistics(adapter)
        part, depth = plan.prefill, len(adapter.layers)
        self._reduces = isinstance(part, PrefillPart) and bool(part.stages(depth))
        probe = part.tower if self._reduces and isinstance(part, PrefillPart) else None
        self._tower = None if probe is None else Tower(adapter, probe, self._stats.own_work)
        config = adapter.decoder.config
        self._original: str = config._attn_implementation
        self._named = copy.copy(config)  # says the original's name while ours is set
        self._name = attention_hook.register(self._original)
        self._divergence: Divergence | None = None
        self._put_on()

    def _put_on(self) -> None:
        """Set the hooks that :meth:`detach` takes off."""
        adapter = self._adapter
        self._handles = hooks.put_on(self)
        for attention in adapter.attentions:
            attention.__dict__["_lightvlm_run"] = self  # not a submodule, not a parameter
        adapter.decoder.config._attn_implementation = self._name
        if self._tower is not None:
            self._tower.put_on()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Restore the model. Harmless when called twice."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for attention in self._adapter.attentions:
            del attention._lightvlm_run
        self._adapter.decoder.config._attn_implementation = self._original
        if self._tower is not None:
            self._tower.take_off()

    @property
    def attached(self) -> bool:
        """Whether the plan is on the model."""
        return bool(self._handles)

    def reads(self, cache: CompactCache) -> bool:
        """Whether the model is being called with this cache right now."""
        return self._forward.cache is cache

    def report(self) -> Report:
        """What happened since attach (see :class:`lightvlm.report.Report`)."""
        self._stats.errors += device_errors()
        found = self._stats.report()
        found.kl = self._divergence.summary() if self._divergence is not None else None
        return found

    def divergence(self, inputs: Mapping[str, Any], *, new_tokens: int = 64) -> Divergence:
        """Measure the run's plan against the full model (see :func:`lightvlm.divergence`).

        The run is off the model meanwhile, and another one is measured, so that nothing of this is counted in the
        report but :attr:`Report.kl`, the last measure. Caches that the run filled can be gone on with afterwards.

        Raises:
            TypeError, ValueError: what is wrong with an argument, or that the run is detached.
        """
        from .kl import divergence

        if not self.attached:
            raise ValueError("the run is detached; use lightvlm.divergence(model, inputs, plan)")
        self.detach()
        try:
            self._divergence = divergence(self._adapter.model, inputs, self.plan, new_tokens=new_tokens)
        finally:
            self._put_on()
        return self._divergence

    @contextlib.contextmanager
    def reading(self, cache: CompactCache) -> Iterator[None]:
        """Let the decoder's layers fill and read ``cache`` without a call of the base model."""
        self._become(Forward(cache=cache))
        try:
            yield
        finally:
            self._become(Forward())

    # -- for the hooks

    def _become(self, forward: Forward) -> None:
        """Let a forward take the place of the one before, which may not have got to its end."""
        before, self._forward = self._forward, forward
        if self._tower is not None:
            self._tower.end_call()
        before.stop_observing()

    @property
    def _device(self) -> torch.device:
        """Where the decoder's layers are; embeddings and inputs may be elsewhere."""
        return next(self._adapter.layers[0].parameters()).device

    def writes(self, layer: CompactLayer, key: Tensor, value: Tensor) -> bool:
        """Whether the attention to come writes these states itself (:func:`decoder_attention.writes`)."""
        return decoder_attention.writes(self, layer, key, value)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The decoder's attention (:func:`decoder_attention.attend`)."""
        return decoder_attention.attend(self, module, query, key, value, mask, **kwargs)
