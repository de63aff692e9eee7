"""The hooks that attach puts on a model, in the order in which a forward meets them.

The head's hook and the base model's see what is asked for (``forward_start.py``), the decoder's what goes into its
layers, and a layer's hook shortens hidden states, rotary tables and positions together. The layer's attention comes
after it (``decoder_attention.py``), and at last the hook behind the base model (``forward_end.py``).
"""

from __future__ import annotations

import contextlib
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightvlm_ext import observe

from .forward import Forward
from .forward_end import finish
from .forward_start import start
from .layout import BatchLayout
from .positions import ShiftedTables, decoder_positions
from .statistics import Timer

if TYPE_CHECKING:
    from .runtime import Run


def put_on(run: Run) -> list[RemovableHandle]:
    """Register a run's hooks on its model."""
    adapter = run._adapter
    return [
        adapter.model.register_forward_pre_hook(partial(_before_head, run), with_kwargs=True),
        adapter.base.register_forward_pre_hook(partial(_before_model, run), with_kwargs=True),
        adapter.base.register_forward_hook(partial(_after_model, run), always_call=True),
        adapter.decoder.register_forward_pre_hook(partial(_before_decoder, run), with_kwargs=True),
        *(
            layer.register_forward_pre_hook(partial(_before_layer, run, index), with_kwargs=True)
            for index, layer in enumerate(adapter.layers)
        ),
    ]


def _before_head(run: Run, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What the model with its head is asked for, which its base does not see."""
    if args:
        kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    if kwargs.get("labels") is not None and run._reduces:
        raise ValueError("labels cannot be used while a plan shortens the sequence; detach the run first")
    wanted = kwargs.get("logits_to_keep")
    if not isinstance(wanted, int):
        wanted = 0
    run._coming = Forward(drafts=max(0, wanted - 1), one_logit=wanted == 1)


def _before_model(run: Run, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Find out what the call is, and plan it."""
    inputs = run._signature.bind(*args, **kwargs).arguments
    inputs.update(inputs.pop("kwargs", {}))
    forward, run._coming = run._coming, Forward()
    run._become(forward)
    current = run._adapter.decoder.config._attn_implementation
    if current != run._name:
        raise RuntimeError(
            f"the model's attention was set to {current!r} while a run is attached; detach the run first"
        )
    if run._tower is not None:
        run._tower.begin_call(run._adapter.encoded(inputs))
    forward.timer = Timer(next(module.parameters()).device)
    said = getattr(inputs.get("past_key_values"), "transcript", None)
    if said is not None and said.unfinished:
        raise ValueError(
            "past_key_values is a cache whose conversation was being read anew when a call failed; reset it"
        )
    forward.observer = observe(lambda call: run._stats.add_op(call, forward.prompt))
    forward.observer.__enter__()
    try:
        start(run, inputs)
    except BaseException:
        run._become(Forward())
        raise
    return (), inputs


def _before_decoder(run: Run, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand over what the vision tower showed, put a conversation in the place of a question, and note positions."""
    forward = run._forward
    entry, cache, changed = forward.entry, forward.cache, None
    seen = _see(run, entry.layout if entry is not None else forward.layout)
    if entry is not None and cache is not None:
        changed = entry.enter(run, cache, module, args, kwargs, seen)
        if entry.anew is not None and forward.prefill is not None and run._tower is not None:
            seen = entry.transcript.seen(run._device)
    if run._tower is not None and forward.prefill is not None:
        if isinstance(seen, Tensor):
            forward.prefill.give_tower(seen[..., 0], seen[..., 1:] if seen.shape[-1] > 1 else None)
        else:
            run._stats.step_aside(seen or "earlier images were read without the vision tower's attention")
            forward.prefill = None
    shifts = cache.position_shifts if cache is not None else []
    if forward.prefill is not None or shifts:
        positions = decoder_positions(module, *(changed if changed is not None else (args, kwargs)))
        if positions is not None and forward.prefill is not None:
            forward.prefill.begin(positions)
        elif positions is not None:
            forward.shifted = ShiftedTables(run._adapter, shifts, positions)
    return changed


def _see(run: Run, layout: BatchLayout | None) -> Tensor | str | None:
    """What the tower showed of the call's own images, or why nothing; None where it brings none, or nobody asks."""
    if run._tower is None or layout is None or not layout.has_images:
        return None
    with run._stats.own_work(run._device):
        return run._tower.read(layout, run._device)


def _before_layer(
    run: Run, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What the layer gets instead, where the prompt is shorter by now or its positions are numbered anew."""
    prefill, shifted = run._forward.prefill, run._forward.shifted
    if shifted is not None:
        hidden = args[0] if args else kwargs["hidden_states"]
        tables = shifted.at(index, hidden)
        if tables is not None:
            kwargs["position_embeddings"] = tables
        return args, kwargs
    if prefill is None:
        return None
    hidden = args[0] if args else kwargs.pop("hidden_states")
    assert isinstance(hidden, Tensor)
    own = index == 0 or index in prefill.stages
    with run._stats.own_work(run._device) if own else contextlib.nullcontext():
        hidden = prefill.enter(index, hidden, kwargs)
    if run._trace and index in prefill.stages:
        run.kept[index] = prefill.kept()
    return (hidden, *args[1:]), kwargs


def _after_model(run: Run, module: nn.Module, args: Any, output: Any) -> Any:
    """End the forward, whether it came to its end or raised (``output`` is None)."""
    try:
        if output is not None:
            finish(run, output)
            entry = run._forward.entry
            if entry is not None and entry.anew is not None:
                return entry.leave(output, run._forward.prefill)
        return None
    finally:
        run._become(Forward())
