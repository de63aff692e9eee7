"""The decoder's attention while a run is attached: what a prompt's tokens, and later ones, attend to.

A layer is attended by the model's own function wherever that sees all it must; what is left of a prompt needs other
rows, and a shortened or packed cache other keys. After a prompt's attention the layer is shown to whoever chooses by
it, and stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightvlm_ext._kv import PACKED_HEAD_DIMS

from . import attention_hook
from .contract.cache import CachePart
from .prompt_eviction import PromptEviction
from .stored_attention import attend_new, attend_stored, fits, reads_quickly

if TYPE_CHECKING:
    from .cache_layer import CompactLayer
    from .runtime import Run


def attend(
    run: Run, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer. query (B, Hq, S, D), key and value (B, Hkv, N, D); returns (B, S, Hq, D), and weights
    where the model's own function gives them."""
    forward, scale = run._forward, kwargs.get("scaling")
    layer = forward.cache.layers[int(module.layer_idx)] if forward.cache is not None else None
    if forward.prompt:
        found = _attend_prompt(run, module, query, key, value, mask, **kwargs)
        _use_prompt(run, int(module.layer_idx), layer, query, key, value, scale)
        return found
    if layer is not None and layer.waiting is not None:
        if fits(query, layer):
            found = attend_new(query, layer, scale), None
            layer.remember_queries(query.transpose(1, 2), scale)
            return found
        key, value = layer.write_waiting()
    if layer is not None and (layer.reads_itself or (_watches(run) and reads_quickly(query, layer))):
        found = attend_stored(query, layer, scale), None
    else:
        found = _original(run, module)(module, query, key, value, mask, **kwargs)
    if layer is not None:
        layer.remember_queries(query.transpose(1, 2), scale)
    return found


def writes(run: Run, layer: CompactLayer, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`attend` will read these states of a decoding step, (B, Hkv, S, D), from the layer, and not by the
    model's own function, so that it can write them in the same call."""
    if run._forward.prompt or layer.packed is not None or not layer.is_initialized:
        return False
    if layer.live is not None and not layer.stepping:  # another call, between the steps of a loop
        return False
    one = key.shape[2] == 1 and key.shape[3] == value.shape[3] and key.shape[3] in PACKED_HEAD_DIMS
    return one and (layer.reads_itself or _watches(run))


def _watches(run: Run) -> bool:
    """Whether whole layers are decoded by our attention, too."""
    return run._forward.watched and run._original != "eager"


def _original(run: Run, module: Any) -> Any:
    """The model's own attention function."""
    call = attention_hook.original_function(module, run._original)
    return attention_hook.under_its_name(call, run._named) if "flash" in run._original else call


def _attend_prompt(
    run: Run, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention among the tokens that are left of a prompt."""
    index, sparse, prefill = int(module.layer_idx), run._forward.sparse, run._forward.prefill
    if sparse is not None and index >= sparse.part.full_layers:
        return sparse.attend(index, query, key, value, kwargs.get("scaling")), None
    call = _original(run, module)
    if prefill is not None and prefill.reduced:
        eager, starts = run._original == "eager", prefill.level.starts
        return attention_hook.causal_rows(call, eager, module, query, key, value, starts, **kwargs), None
    found: tuple[Tensor, Tensor | None] = call(module, query, key, value, mask, **kwargs)
    return found


def _use_prompt(
    run: Run,
    index: int,
    layer: CompactLayer | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
) -> None:
    """Show a prompt's attention to the prefill method and to the cache method; tell the cache's layer what it holds."""
    forward = run._forward
    prefill, sparse, layout = forward.prefill, forward.sparse, forward.layout
    if prefill is not None and prefill.scores_at(index):
        with run._stats.own_work(query.device):
            prefill.score(query, key, scale)
    if layer is None or layout is None:
        return
    starts, tail, shortened = [row.leftpad for row in layout.rows], layout.length, False
    if prefill is not None:
        starts, shortened = prefill.level.starts, prefill.reduced
        tail = prefill.level.tail if shortened else tail
    layer.begin(starts, layout.length, tail, shortened)
    evicts = _observe_prompt(run, index, query, key, value, scale)
    if not evicts and (sparse is None or index < sparse.part.full_layers):
        # at once, so that a prompt is never in 16 bits in more than one layer
        assert forward.cache is not None
        text = forward.text_places(len(run._adapter.layers))
        forward.cache.pack_prompt(None, forward.drafts, text=text, only=index)


def _observe_prompt(
    run: Run, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> bool:
    """Show a layer's attention to a cache method that evicts from the prompt; whether there is one."""
    forward = run._forward
    part = forward.cache.plan.cache if forward.cache is not None else None
    if not isinstance(part, CachePart) or not part.evicts_prompt or forward.layout is None:
        return False
    # attach refuses such a plan, but this one may be the cache's own
    if forward.sparse_drops:
        if index == 0:
            run._stats.step_aside("the cache's plan evicts from a prompt whose tokens the run's plan drops")
        return False
    if forward.eviction is None:
        forward.eviction = PromptEviction(part, forward.layout, len(run._adapter.layers), forward.drafts)
    level = forward.prefill.level if forward.prefill is not None else None
    with run._stats.own_work(query.device):
        forward.eviction.observe(index, level, query, key, value, scale)
    return True
