"""A prompt before the layers run: where its tokens are, and what the plan will do with them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .contract.prefill import PrefillPart
from .contract.sparse import AttentionPart
from .layout import BatchLayout, LayoutError, read_layout
from .models.base import Adapter
from .session import Prefill
from .sparse_attention import SparsePrefill

if TYPE_CHECKING:
    from .runtime import Run


def read_prompt(adapter: Adapter, inputs: dict[str, Any], mask: Tensor | None) -> BatchLayout:
    """The layout of a call's tokens: the one host read of a prefill, but for grids that come with Qwen's pixels.

    Raises:
        LayoutError: no plan can work on such tokens.
    """
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    is_image = adapter.is_image(inputs)
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
    sizes, grids = adapter.image_shapes(inputs) if flags[0].any() else (None, None)
    return read_layout(flags[0], flags[1], sizes, grids, on_host[2:] if len(on_host) == 5 else None)


def plan_prompt(run: Run, layout: BatchLayout) -> None:
    """Make the forward one that reads a prompt of this layout."""
    forward = run._forward
    forward.prompt, forward.layout, run.kept = True, layout, {}
    planned = run.plan.prefill is not None
    with run._stats.own_work(run._device) if planned else contextlib.nullcontext():
        forward.prefill = _plan_reduction(run, layout)
        forward.sparse = _plan_sparse(run, layout)


def _plan_reduction(run: Run, layout: BatchLayout) -> Prefill | None:
    part = run.plan.prefill
    if not run._reduces or not layout.has_images:
        return None
    assert isinstance(part, PrefillPart)
    longest = max(sum(row.image_sizes) for row in layout.rows)
    if longest < part.min_image_tokens:
        run._stats.step_aside(f"fewer than min_image_tokens ({part.min_image_tokens}) image tokens")
        return None
    return Prefill(part, layout, run._adapter, run._device, run._forward.drafts)


def _plan_sparse(run: Run, layout: BatchLayout) -> SparsePrefill | None:
    part = run.plan.prefill
    if not isinstance(part, AttentionPart):
        return None
    longest = max(row.tokens for row in layout.rows)
    if longest < part.min_tokens or min(row.tokens for row in layout.rows) == 0:
        run._stats.step_aside(f"fewer than min_tokens ({part.min_tokens}) tokens, or none in a row")
        return None
    return SparsePrefill(part, layout, run._device, run._forward.drafts)
