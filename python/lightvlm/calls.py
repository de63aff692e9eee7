"""What a call of the model brings: its tokens, its cache, its mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def tokens_of(inputs: dict[str, Any]) -> Tensor | None:
    """input_ids (B, S) or inputs_embeds (B, S, C) of a call."""
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")


def new_tokens(output: Any) -> int:
    """Tokens that the base model just computed."""
    hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return int(hidden.shape[1])


def is_compact(cache: Any) -> bool:
    from .cache import CompactCache

    return isinstance(cache, CompactCache)


def replaceable(cache: Any) -> bool:
    """An empty dynamic cache holds nothing that ours would lose; any other kind was chosen on purpose."""
    plain = type(cache).__name__ == "DynamicCache" and not getattr(cache, "offloading", False)
    return plain or is_compact(cache)


def describe(cache: Any) -> str:
    offloaded = getattr(cache, "offloading", False)
    return f"{'an offloaded' if offloaded else 'a'} {type(cache).__name__}"


def check_new_tokens(inputs: dict[str, Any]) -> None:
    """Refuse new tokens that a shortened cache cannot tell apart: it knows where keys stand, not which to skip."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError("attention_mask must be a 2-D padding mask on a cache that a plan has shortened")
    tokens = tokens_of(inputs)
    new = 1 if tokens is None else tokens.shape[1]
    if new > 1 and not bool(mask[:, -new:].all()):  # single tokens are never padding, and must not wait
        raise ValueError(
            "attention_mask has padding among the new tokens, which a cache that a plan has shortened cannot skip; "
            "continue rows of different length one by one"
        )
