"""Attention of an attached decoder at prefill: the model's own, with rows of unequal length one by one.

transformers finds an attention function by name. ``attach`` gives the text decoder's attention the name
``lightvlm_<the model's own>``, registered here together with the mask function of the original: without one,
transformers would make no mask at all and ignore padding without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "lightvlm_"


def register(original: str) -> str:
    """Register our attention around the implementation
    ``original``; returns the name to set on the text config."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = PREFIX + original
    AttentionInterface.register(name, _attention)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def check_implementation(name: str | None) -> None:
    """Raise a ValueError unless this attention of transformers is causal without a mask, which
    :func:`causal_rows` relies on."""
    known = name in ("eager", "sdpa", "lightvlm") or "flash" in (name or "")
    if not known or (name or "").startswith("paged|"):
        raise ValueError(
            f"model uses the attention implementation {name!r}; lightvlm works with eager, sdpa and flash attention, "
            "and with its own (lightvlm.register_attention)"
        )


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    run = getattr(module, "_lightvlm_run", None)
    if run is None:
        raise RuntimeError(f"{type(module).__name__} uses lightvlm's attention but no run is attached to it")
    result: tuple[Tensor, Tensor | None] = run.attend(module, query, key, value, attention_mask, **kwargs)
    return result


def original_function(module: nn.Module, original: str) -> Any:
    """The attention function that ``original`` names for this module, eager ones included."""
    import sys

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original == "eager":  # each modelling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[original]


def under_its_name(call: Any, config: Any) -> Any:
    """``call``, an attention function, with ``config`` in the place of the module's.

    transformers' flash attention looks up in the module's configuration which package it shall use, by the
    implementation's name, and ours is the name of none.
    """

    def wrapped(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own, module.config = module.config, config
        try:
            return call(module, *args, **kwargs)
        finally:
            module.config = own

    return wrapped


def causal_rows(
    call: Any,
    eager: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: list[int],
    **kwargs: Any,
) -> Tensor:
    """Causal attention over rows that stand flush right behind ``starts`` padding tokens, without a mask.

    query, key, value (B, H, M, D) of one length. Rows that differ in length are attended one by one, exactly
    as they would be at batch 1; padding gets zeros. Returns (B, M, Hq, D).
    """
    # Gaps between the kept tokens' positions would look like packed sequences to FlashAttention's wrapper.
    kwargs["position_ids"] = None
    if not any(starts):
        whole: Tensor = call(module, query, key, value, _eager_mask(query) if eager else None, **kwargs)[0]
        return whole
    batch, heads, length, _ = query.shape
    out = value.new_zeros(batch, length, heads, value.shape[-1])
    for row, start in enumerate(starts):
        if start == length:  # a chunk of a prompt may hold nothing but a row's padding
            continue
        part = [x[row : row + 1, :, start:] for x in (query, key, value)]
        out[row, start:] = call(module, *part, _eager_mask(part[0]) if eager else None, **kwargs)[0][0]
    return out


def _eager_mask(query: Tensor) -> Tensor:
    """Eager attention knows causality only from a mask: (1, 1, M, M), additive."""
    length = query.shape[2]
    blocked = torch.full(
        (length, length), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device
    )
    return blocked.triu(1)[None, None]
