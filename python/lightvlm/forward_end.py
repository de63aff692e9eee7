"""How a forward ends: the cache is brought down to what the plan keeps, and the report's sums grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .calls import new_tokens

if TYPE_CHECKING:
    from .runtime import Run


def finish(run: Run, output: Any) -> None:
    """After the last layer; ``output`` is the base model's."""
    forward, stats = run._forward, run._stats
    cache, evicted = forward.cache, False
    if forward.eviction is not None and cache is not None:
        with stats.own_work(run._device):
            evicted = forward.eviction.evict(cache)
    if cache is not None and not forward.prompt:
        stats.compactions += cache.step(new_tokens(output), forward.drafts)
    if forward.timer is not None:
        stats.add_time("prefill" if forward.prompt else "decode", forward.timer.stop())
    if forward.prompt:
        _finish_prompt(run)
    if forward.entry is not None:
        said = forward.entry.transcript
        if forward.prompt:
            said.dropped = forward.prefill is not None or forward.sparse_drops or evicted
        stats.add_later(forward.entry.anew is not None, said.nbytes)
    stats.add_cache(cache if cache is not None else getattr(output, "past_key_values", None))


def _finish_prompt(run: Run) -> None:
    """Count a prompt, and drop and pack what the layers had to leave for the end of it."""
    forward, stats, cache = run._forward, run._stats, run._forward.cache
    if forward.layout is not None:
        stats.add_prompt(forward.layout, forward.prefill)
    selections = None
    if forward.sparse is not None:
        selections = forward.sparse.selections
        stats.add_sparse(forward.sparse)
        if cache is not None and forward.sparse_drops:
            cache.keep_only(selections, forward.sparse.tail)
    if cache is None:
        return
    if forward.prefill is not None:
        cache.position_shifts = forward.prefill.shifts
    cache.pack_prompt(selections, forward.drafts, text=forward.text_places(len(run._adapter.layers)))
