"""attach: put a plan on a model, and take it off again.

Two hook points do everything. The text decoder's attention is set to our registered function, which sees
queries and keys after the rotary embedding; and a forward pre-hook on every decoder layer shortens hidden
states, rotary tables and positions together. ``detach`` restores the model bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import attention_hook, calls, later
from .flops import head_width
from .layout import BatchLayout, LayoutError, read_layout
from .methods.base import AttentionPart, CachePart, PrecisionPart, PrefillPart
from .models import find_adapter
from .models.base import Adapter
from .packing import check_storage
from .plan import Plan
from .positions import ShiftedTables, decoder_positions
from .probing import check_look_ahead
from .prompt_eviction import PromptEviction, check_eviction
from .report import Report
from .session import Prefill, text_places
from .sparse_attention import SparsePrefill
from .statistics import Statistics, Timer
from .stored_attention import attend_stored, reads_quickly
from .tower import Tower

if TYPE_CHECKING:
    from .cache import CompactCache
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
    if isinstance(plan.prefill, PrefillPart):
        stages = plan.prefill.stages(len(adapter.layers))
        if stages and stages[0].layer < adapter.first_layer:
            raise ValueError(
                f"plan reduces tokens at layer {stages[0].layer}; {type(model).__name__} allows it from layer "
                f"{adapter.first_layer} on"
            )
        if stages and plan.prefill.probe is not None and plan.prefill.probe.layer == "coming":
            for stage in stages:
                check_look_ahead(adapter.layers[stage.layer])
    return Run(adapter, plan, trace)


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
        from lightvlm_ext import observe

        self.plan = plan
        self.kept: dict[int, list[list[list[int]]]] = {}
        """With ``trace``: stage's layer -> row -> image -> indices of the kept tokens, of the last prompt."""
        self._trace = trace
        self._adapter = adapter
        self._signature = inspect.signature(adapter.base.forward)
        self._prefill: Prefill | None = None
        self._sparse: SparsePrefill | None = None
        self._eviction: PromptEviction | None = None
        self._cache: CompactCache | None = None
        self._layout: BatchLayout | None = None
        self._text: list[list[list[int]]] | None = None
        self._prompt = self._own = False
        self._drafts = self._unsure = 0
        self._one_logit = False
        self._call: later.Call | None = None
        self._shifted: ShiftedTables | None = None
        self._timer: Timer | None = None
        self._stats = Statistics(adapter)
        self._observe = observe
        self._observer: AbstractContextManager[object] | None = None
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
        self._handles = [
            adapter.model.register_forward_pre_hook(self._before_head, with_kwargs=True),
            adapter.base.register_forward_pre_hook(self._before_model, with_kwargs=True),
            adapter.base.register_forward_hook(self._after_model, always_call=True),
            adapter.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
        ]
        for index, layer in enumerate(adapter.layers):
            self._handles.append(layer.register_forward_pre_hook(_LayerHook(self, index), with_kwargs=True))
        for attention in adapter.attentions:
            attention.__dict__["_lightvlm_run"] = self  # not a submodule, not a parameter
        adapter.decoder.config._attn_implementation = self._name
        if self._tower is not None:
            self._tower.put_on()

    # -- handle
    # ------------------------------------------------------------------------------------------------

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
        return self._cache is cache

    def report(self) -> Report:
        """What happened since attach (see :class:`lightvlm.report.Report`)."""
        from lightvlm_ext import device_errors

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
        self._forget()
        self._cache = cache
        try:
            yield
        finally:
            self._cache = None

    # -- hooks
    # -------------------------------------------------------------------------------------------------

    def _before_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the model with its head is asked for, which its base does not see."""
        if args:
            kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        if kwargs.get("labels") is not None and self._reduces:
            raise ValueError("labels cannot be used while a plan shortens the sequence; detach the run first")
        wanted = kwargs.get("logits_to_keep")
        self._drafts = max(0, wanted - 1) if isinstance(wanted, int) else 0
        self._one_logit = isinstance(wanted, int) and wanted == 1

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = self._signature.bind(*args, **kwargs).arguments
        inputs.update(inputs.pop("kwargs", {}))
        drafts, self._drafts = self._drafts, 0
        one_logit, self._one_logit = self._one_logit, False
        self._forget()
        self._unsure = drafts
        current = self._adapter.decoder.config._attn_implementation
        if current != self._name:
            raise RuntimeError(
                f"the model's attention was set to {current!r} while a run is attached; detach the run first"
            )
        if self._tower is not None:
            self._tower.begin_call(self._adapter.encoded(inputs))
        self._timer = Timer(next(module.parameters()).device)
        cache = inputs.get("past_key_values")
        said = getattr(cache, "transcript", None)
        if said is not None and said.unfinished:
            raise ValueError(
                "past_key_values is a cache whose conversation was being read anew when a call failed; reset it"
            )
        self._observer = self._observe(lambda call: self._stats.add_op(call, self._prompt))
        self._observer.__enter__()
        try:
            if cache is not None and cache.get_seq_length() > 0:
                self._continue(cache, inputs, drafts, one_logit)
            else:
                self._begin(cache, inputs, drafts, one_logit)
        except BaseException:
            self._forget()
            raise
        return (), inputs

    def _continue(self, cache: Any, inputs: dict[str, Any], drafts: int, one_logit: bool) -> None:
        """More tokens on a filled cache: they are all appended, and image tokens among them are not reduced, unless
        they are a question to what was dropped."""
        if calls.is_compact(cache):
            cache.check_model(self._adapter.decoder.config)
        if calls.is_compact(cache) and cache.leftpad:
            self._own = cache.reads_itself
            if self._own:
                calls.check_new_tokens(inputs)
            cache.run = weakref.ref(self)
            self._cache = cache
            if cache.waits:  # drafts that were wrong have been cropped by now
                self._stats.compactions += cache.step(0)
            if cache.transcript is not None and later.resume(self, cache, inputs, drafts, one_logit):
                return
        if self._reduces and self._adapter.has_pixels(inputs):
            self._stats.step_aside(
                "an image arrived on a cache that already holds tokens; nothing was read anew"
            )

    def _begin(self, cache: Any, inputs: dict[str, Any], drafts: int, one_logit: bool) -> None:
        """A prompt on an empty cache: plan its reduction and put a CompactCache in the place of a dynamic one."""
        self._prompt = True
        self.kept = {}
        if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
            return None  # the model says it better
        replaceable = cache is None or calls.replaceable(cache)
        if not replaceable:
            self._step_aside(f"{calls.describe(cache)} was given; leave it out or pass a CompactCache")
        mask = inputs.get("attention_mask")
        try:
            if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
                raise LayoutError("the attention mask is not a 2-D padding mask")
            self._layout = self._read_layout(inputs, mask)
        except LayoutError as error:
            return self._step_aside(str(error)) if replaceable else None
        if not replaceable:
            return None
        self.plan_prompt(self._layout, inputs, drafts)
        use_cache = inputs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._adapter.decoder.config, "use_cache", True)
        # without anything to do, the model's own cache is left alone
        drops = self._sparse is not None and self._sparse.part.unimportant == "drop"
        parts = self.plan.cache is not None or self.plan.precision is not None
        needed = self._prefill is not None or parts or drops
        if calls.is_compact(cache) or (needed and (use_cache or cache is not None)):
            self._cache = own = inputs["past_key_values"] = self._own_cache(cache, self._layout)
            later.start(self, own, inputs, self._layout, one_logit)
        return None

    def plan_prompt(self, layout: BatchLayout, inputs: dict[str, Any], drafts: int) -> None:
        """Treat the call as a prompt of this layout."""
        self._prompt, self.kept, self._layout = True, {}, layout
        planned = self.plan.prefill is not None
        with self._stats.own_work(self._device) if planned else contextlib.nullcontext():
            self._prefill = self._plan_prefill(layout, inputs, drafts)
            self._sparse = self._plan_sparse(layout, inputs, drafts)

    def _step_aside(self, reason: str) -> None:
        """Note that the plan does not apply, if there is anything that it would have done."""
        plan = self.plan
        parts = plan.cache is not None or plan.precision is not None
        if self._reduces or parts or isinstance(plan.prefill, AttentionPart):
            self._stats.step_aside(reason)

    def _read_layout(self, inputs: dict[str, Any], mask: Tensor | None) -> BatchLayout:
        """The one host read of a prefill."""
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        is_image = self._adapter.is_image(inputs)
        if is_image is None:
            is_image = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is None:
            mask = torch.ones_like(is_image)
        elif mask.shape != is_image.shape:
            raise LayoutError("the attention mask and the tokens differ in shape")
        streams = [is_image, mask.to(is_image.device).bool()]
        positions = inputs.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[1:] == is_image.shape:
            # M-RoPE: frame, row and column of each token, which say an image's grid
            streams = [x.int() for x in (*streams, *positions[-3:].to(is_image.device))]
        on_host = torch.stack(streams).cpu()
        flags = on_host[:2].bool()
        sizes, grids = self._adapter.image_shapes(inputs) if flags[0].any() else (None, None)
        return read_layout(flags[0], flags[1], sizes, grids, on_host[2:] if len(on_host) == 5 else None)

    def _own_cache(self, cache: Any, layout: BatchLayout) -> CompactCache:
        from .cache import CompactCache

        if calls.is_compact(cache):
            cache.check_model(self._adapter.decoder.config)
        own = cache if calls.is_compact(cache) else CompactCache(self._adapter.decoder.config, self.plan)
        if cache is not None and own is not cache:
            own = own.take_place_of(cache)
        own.begin(self, [row.leftpad for row in layout.rows])
        return own

    def _plan_prefill(self, layout: BatchLayout, inputs: dict[str, Any], drafts: int) -> Prefill | None:
        part = self.plan.prefill
        if not self._reduces or not layout.has_images:
            return None
        assert isinstance(part, PrefillPart)
        longest = max(sum(row.image_sizes) for row in layout.rows)
        if longest < part.min_image_tokens:
            self._stats.step_aside(f"fewer than min_image_tokens ({part.min_image_tokens}) image tokens")
            return None
        return Prefill(part, layout, self._adapter, self._device, drafts)

    def _plan_sparse(self, layout: BatchLayout, inputs: dict[str, Any], drafts: int) -> SparsePrefill | None:
        part = self.plan.prefill
        if not isinstance(part, AttentionPart):
            return None
        longest = max(row.tokens for row in layout.rows)
        if longest < part.min_tokens or min(row.tokens for row in layout.rows) == 0:
            self._stats.step_aside(f"fewer than min_tokens ({part.min_tokens}) tokens, or none in a row")
            return None
        return SparsePrefill(part, layout, self._device, drafts)

    @property
    def _device(self) -> torch.device:
        """Where the decoder's layers are; embeddings and inputs may be elsewhere."""
        return next(self._adapter.layers[0].parameters()).device

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = None
        seen = self._see(self._call.layout if self._call is not None else self._layout)
        if self._call is not None and self._cache is not None:
            changed = self._call.enter(self, self._cache, module, args, kwargs, seen)
            if self._call.anew is not None and self._prefill is not None and self._tower is not None:
                seen = self._call.transcript.seen(self._device)
        if self._tower is not None and self._prefill is not None:
            if isinstance(seen, Tensor):
                self._prefill.give_tower(seen[..., 0], seen[..., 1:] if seen.shape[-1] > 1 else None)
            else:
                self._stats.step_aside(
                    seen or "earlier images were read without the vision tower's attention"
                )
                self._prefill = None
        shifts = self._cache.position_shifts if self._cache is not None else []
        if self._prefill is not None or shifts:
            positions = decoder_positions(module, *(changed if changed is not None else (args, kwargs)))
            if positions is not None and self._prefill is not None:
                self._prefill.begin(positions)
            elif positions is not None:
                self._shifted = ShiftedTables(self._adapter, shifts, positions)
        return changed

    def _see(self, layout: BatchLayout | None) -> Tensor | str | None:
        """What the tower showed of the call's own images, or why nothing; None where it brings none, or nobody asks."""
        if self._tower is None or layout is None or not layout.has_images:
            return None
        with self._stats.own_work(self._device):
            return self._tower.read(layout, self._device)

    def _before_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._shifted is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            tables = self._shifted.at(index, hidden)
            if tables is not None:
                kwargs["position_embeddings"] = tables
            return args, kwargs
        if self._prefill is None:
            return None
        hidden = args[0] if args else kwargs.pop("hidden_states")
        assert isinstance(hidden, Tensor)
        own = index == 0 or index in self._prefill.stages
        with self._stats.own_work(self._device) if own else contextlib.nullcontext():
            hidden = self._prefill.enter(index, hidden, kwargs)
        if self._trace and index in self._prefill.stages:
            self.kept[index] = self._prefill.kept()
        return (hidden, *args[1:]), kwargs

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The decoder's attention. query (B, Hq, S, D), key and
        value (B, Hkv, N, D); returns (B, S, Hq, D)."""
        index = int(module.layer_idx)
        scale = kwargs.get("scaling")
        layer = self._cache.layers[index] if self._cache is not None else None
        call = attention_hook.original_function(module, self._original)
        if "flash" in self._original:
            call = attention_hook.under_its_name(call, self._named)
        weights = None
        if self._prompt:
            level = self._prefill.level if self._prefill is not None else None
            if self._sparse is not None and index >= self._sparse.part.full_layers:
                out = self._sparse.attend(index, query, key, value, scale)
            elif self._prefill is not None and self._prefill.reduced:
                assert level is not None
                out = attention_hook.causal_rows(
                    call, self._original == "eager", module, query, key, value, level.starts, **kwargs
                )
            else:
                out, weights = call(module, query, key, value, mask, **kwargs)
            if self._prefill is not None and self._prefill.scores_at(index):
                with self._stats.own_work(query.device):
                    self._prefill.score(query, key, scale)
            if layer is not None and self._layout is not None:
                starts = level.starts if level is not None else [row.leftpad for row in self._layout.rows]
                shortened = self._prefill is not None and self._prefill.reduced
                tail = level.tail if level is not None and shortened else self._layout.length
                layer.begin(starts, self._layout.length, tail, shortened)
                evicts = self._observe_prompt(index, query, key, value, scale)
                if not evicts and (self._sparse is None or index < self._sparse.part.full_layers):
                    # at once, so that a prompt is never in 16 bits in more than one layer
                    assert self._cache is not None
                    self._cache.pack_prompt(None, self._unsure, text=self._text_places(), only=index)
        elif layer is not None and (
            layer.reads_itself or (self._own and self._original != "eager" and reads_quickly(query, layer))
        ):
            out = attend_stored(query, layer, scale)
        else:
            out, weights = call(module, query, key, value, mask, **kwargs)
        if not self._prompt and layer is not None:
            layer.remember_queries(query.transpose(1, 2), scale)
        return out, weights

    def _observe_prompt(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> bool:
        """Show a layer's attention to a cache method that evicts from the prompt; whether there is one."""
        part = self._cache.plan.cache if self._cache is not None else None
        if not isinstance(part, CachePart) or not part.evicts_prompt or self._layout is None:
            return False
        # attach refuses such a plan, but this one may be the cache's own
        if self._sparse is not None and self._sparse.part.unimportant == "drop":
            if index == 0:
                self._stats.step_aside(
                    "the cache's plan evicts from a prompt whose tokens the run's plan drops"
                )
            return False
        if self._eviction is None:
            depth = len(self._adapter.layers)
            self._eviction = PromptEviction(part, self._layout, depth, self._unsure)
        level = self._prefill.level if self._prefill is not None else None
        with self._stats.own_work(query.device):
            self._eviction.observe(index, level, query, key, value, scale)
        return True

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> Any:
        try:
            if output is not None:  # None: the forward raised
                self._finish(output)
                if self._call is not None and self._call.anew is not None:
                    return self._call.leave(output, self._prefill)
            return None
        finally:
            self._forget()

    def _finish(self, output: Any) -> None:
        cache = self._cache
        evicted = False
        if self._eviction is not None and cache is not None:
            with self._stats.own_work(self._device):
                evicted = self._eviction.evict(cache)
        if cache is not None and not self._prompt:
            self._stats.compactions += cache.step(calls.new_tokens(output), self._unsure)
        if self._timer is not None:
            self._stats.add_time("prefill" if self._prompt else "decode", self._timer.stop())
        if self._prompt and self._layout is not None:
            self._stats.add_prompt(self._layout, self._prefill)
        if self._sparse is not None:
            self._stats.add_sparse(self._sparse)
            if cache is not None and self._sparse.part.unimportant == "drop":
                cache.keep_only(self._sparse.selections, self._sparse.tail)
        if self._prefill is not None and cache is not None:
            cache.position_shifts = self._prefill.shifts
        if self._prompt and cache is not None:
            selections = self._sparse.selections if self._sparse is not None else None
            cache.pack_prompt(selections, self._unsure, text=self._text_places())
        if self._call is not None:
            if self._prompt:
                drops = self._sparse is not None and self._sparse.part.unimportant == "drop"
                self._call.transcript.dropped = self._prefill is not None or drops or evicted
            self._stats.add_later(self._call.anew is not None, self._call.transcript.nbytes)
        self._stats.add_cache(cache if cache is not None else getattr(output, "past_key_values", None))

    def _text_places(self) -> list[list[list[int]]] | None:
        """For each layer and row, where text stands in the buffer that the prompt filled; None where nobody asks."""
        precision = self._cache.plan.precision if self._cache is not None else None
        if not (isinstance(precision, PrecisionPart) and precision.keep_text) or self._layout is None:
            return None
        if self._text is not None:
            return self._text
        self._text = text_places(self._layout, self._prefill, len(self._adapter.layers))
        return self._text

    def _forget(self) -> None:
        """Drop what belongs to one call of the model, also where the call before did not get to its end."""
        self._prefill = self._sparse = self._layout = self._cache = self._call = self._shifted = None
        self._text = self._eviction = None
        self._prompt, self._own, self._unsure = False, False, 0
        if self._tower is not None:
            self._tower.end_call()
        observer, self._observer = self._observer, None
        if observer is not None:
            with contextlib.suppress(ValueError):  # an interrupted call may have run in another context
                observer.__exit__(None, None, None)


class _LayerHook:
    """Pre-hook of one decoder layer."""

    def __init__(self, run: Run, index: int) -> None:
        self.run, self.index = run, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.run._before_layer(self.index, args, kwargs)
