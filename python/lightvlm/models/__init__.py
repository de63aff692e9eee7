"""Model families. Adding one adds a file and a line here (docs/adding-a-model.md)."""

from __future__ import annotations

from torch import nn

from .base import Adapter, attention_kinds
from .llava import Llava
from .qwen2_5_vl import Qwen2_5_VL

FAMILIES: tuple[type[Adapter], ...] = (Llava, Qwen2_5_VL)


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
    """Refuse decoders whose layers do not attend to all earlier
    tokens through transformers' attention interface."""
    config = adapter.decoder.config
    other = attention_kinds(config) - {"full_attention"}
    if other:
        raise ValueError(f"model has decoder layers that are not full attention: {', '.join(sorted(other))}")
    for layer, attention in zip(adapter.layers, adapter.attentions, strict=True):
        if getattr(attention, "layer_idx", None) is None:
            raise ValueError(f"model has a {type(layer).__name__} whose attention has no layer_idx")


__all__ = ["Adapter", "find_adapter", "supported_classes"]
