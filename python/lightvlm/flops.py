"""Arithmetic of a decoder's prefill: what a plan leaves of it.

Counted per layer: 2 FLOPs per weight of every linear projection and token, and causal attention's two products,
4 * heads * head_dim FLOPs per (query, key) pair. Embedding and language-model head are left out: the head
runs on the last token alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .models.base import Adapter


def linear_weights(layer: nn.Module) -> int:
    """Weights of a decoder layer that multiply every token."""
    return sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)


def attention_width(adapter: Adapter) -> int:
    """Query heads times head width."""
    return int(adapter.decoder.config.num_attention_heads) * head_width(adapter)


def head_width(adapter: Adapter) -> int:
    """Channels of an attention head."""
    config = adapter.decoder.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_flops(weights: int, width: int, tokens: int) -> int:
    """FLOPs of one layer over ``tokens`` tokens of one row."""
    return 2 * weights * tokens + attention_flops(width, tokens)


def attention_flops(width: int, tokens: int) -> int:
    """FLOPs of causal attention among ``tokens`` tokens of one row."""
    return 4 * width * (tokens * (tokens + 1) // 2)


def prefill_flops(adapter: Adapter, tokens: Sequence[Sequence[int]]) -> int:
    """FLOPs of a prefill in which layer l computes ``tokens[l][b]`` tokens of row b."""
    width = attention_width(adapter)
    return sum(
        layer_flops(weights, width, count)
        for weights, counts in zip(map(linear_weights, adapter.layers), tokens, strict=True)
        for count in counts
    )
