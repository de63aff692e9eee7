"""Model families. Adding one adds a file and a line here (docs/adding-a-model.md)."""

from __future__ import annotations

import inspect

from torch import nn

from .base import Adapter, attention_kinds
from .internvl import InternVL
from .llava import Llava
from .qwen2_5_vl import Qwen2_5_VL

FAMILIES: tuple[type[Adapter], ...] = (InternVL, Llava, Qwen2_5_VL)


def supported_classes() -> list[str]:
    """Names of the transformers classes that :func:`find_adapter` knows."""
    return [name for family in FAMILIES for name in family.classes]


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model; never guesses.

    Raises:
        TypeError: not a module, or a class no family names.
        ValueError: a decoder whose attention no plan may touch; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if names & set(family.classes):
            adapter = family(model)
            _check_decoder(adapter)
            return adapter
    raise TypeError(
        f"model is a {type(model).__name__}, which lightvlm does not know; supported: {', '.join(supported_classes())}"
    )


def _check_decoder(adapter: Adapter) -> None:
    """Refuse decoders that are not built as the hooks need it: every layer attends to all earlier tokens through
    transformers' attention interface and gets its rotary tables as an argument, on one device."""
    config, decoder = adapter.decoder.config, type(adapter.decoder).__name__
    other = attention_kinds(config) - {"full_attention"}
    if other:
        raise ValueError(f"model has decoder layers that are not full attention: {', '.join(sorted(other))}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError("model caps its attention logits, which attention over a shortened cache does not")
    try:
        layers, attentions = adapter.layers, adapter.attentions
    except AttributeError as error:
        raise ValueError(
            f"model has a {decoder} whose layers are not where lightvlm looks: {error}"
        ) from None
    for layer, attention in zip(layers, attentions, strict=True):
        if getattr(attention, "layer_idx", None) is None:
            raise ValueError(f"model has a {type(layer).__name__} whose attention has no layer_idx")
        if "position_embeddings" not in inspect.signature(layer.forward).parameters:
            raise ValueError(
                f"model has a {type(layer).__name__} that takes no rotary tables (position_embeddings)"
            )
    devices = {str(parameter.device) for layer in layers for parameter in layer.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"model has its decoder layers on several devices ({', '.join(sorted(devices))}), not on one"
        )
    if (getattr(adapter.model, "tp_size", None) or 1) > 1:
        raise ValueError("model is split by tensor parallelism, where each part would choose other tokens")


__all__ = ["Adapter", "find_adapter", "supported_classes"]
