"""How a forward starts: as a prompt on an empty cache, or as more tokens on a filled one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import calls, later
from .contract.sparse import AttentionPart
from .layout import BatchLayout, LayoutError
from .prompt import plan_prompt, read_prompt

if TYPE_CHECKING:
    from .cache import CompactCache
    from .runtime import Run


def start(run: Run, inputs: dict[str, Any]) -> None:
    """Find out what the call's tokens are. ``inputs``: the base model's arguments, whose cache may be exchanged."""
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        _start_on_filled(run, cache, inputs)
    else:
        _start_prompt(run, cache, inputs)


def _start_on_filled(run: Run, cache: Any, inputs: dict[str, Any]) -> None:
    """More tokens on a filled cache: they are all appended, and image tokens among them are not reduced, unless they
    are a question to what was dropped."""
    forward = run._forward
    if calls.is_compact(cache):
        cache.check_model(run._adapter.decoder.config)
    if calls.is_compact(cache) and cache.leftpad:
        forward.watched = cache.reads_itself
        if forward.watched:
            calls.check_new_tokens(inputs)
        cache.run = weakref.ref(run)
        forward.cache = cache
        if cache.waits:  # drafts that were wrong have been cropped by now
            run._stats.compactions += cache.step(0)
        if cache.transcript is not None and later.resume(run, cache, inputs):
            return
    if run._reduces and run._adapter.has_pixels(inputs):
        run._stats.step_aside("an image arrived on a cache that already holds tokens; nothing was read anew")


def _start_prompt(run: Run, cache: Any, inputs: dict[str, Any]) -> None:
    """A prompt on an empty cache: plan it, and put a CompactCache in the place of a dynamic one."""
    forward = run._forward
    forward.prompt, run.kept = True, {}
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        return  # the model says it better
    replaceable = cache is None or calls.replaceable(cache)
    if not replaceable:
        _step_aside(run, f"{calls.describe(cache)} was given; leave it out or pass a CompactCache")
    mask = inputs.get("attention_mask")
    try:
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise LayoutError("the attention mask is not a 2-D padding mask")
        forward.layout = layout = read_prompt(run._adapter, inputs, mask)
    except LayoutError as error:
        if replaceable:
            _step_aside(run, str(error))
        return
    if not replaceable:
        return
    plan_prompt(run, layout)
    use_cache = inputs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(run._adapter.decoder.config, "use_cache", True)
    # without anything to do, the model's own cache is left alone
    needed = forward.prefill is not None or forward.sparse_drops or _stores(run)
    if calls.is_compact(cache) or (needed and (use_cache or cache is not None)):
        forward.cache = inputs["past_key_values"] = _compact_cache(run, cache, layout)
        later.start(run, forward.cache, inputs, layout)


def _compact_cache(run: Run, cache: Any, layout: BatchLayout) -> CompactCache:
    """The cache for a prompt: the caller's own where it is ours, else a new one, in the place of the caller's."""
    from .cache import CompactCache

    config = run._adapter.decoder.config
    if calls.is_compact(cache):
        cache.check_model(config)
        own: CompactCache = cache
    else:
        own = CompactCache(config, run.plan)
        if cache is not None:
            own = own.take_place_of(cache)
    own.begin(run, [row.leftpad for row in layout.rows])
    return own


def _step_aside(run: Run, reason: str) -> None:
    """Note that the plan does not apply, if there is anything that it would have done."""
    if run._reduces or _stores(run) or isinstance(run.plan.prefill, AttentionPart):
        run._stats.step_aside(reason)


def _stores(run: Run) -> bool:
    """Whether the plan has a say in what a cache stores, once it is filled."""
    return run.plan.cache is not None or run.plan.precision is not None
