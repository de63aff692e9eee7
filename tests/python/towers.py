"""The vision tower's attention as the model itself computes it: eager, in float64, without lightvlm."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from python.tiny import INTERNVL, LLAVA, QWEN, Family
from torch import Tensor

DEEP: dict[str, dict[str, Any]] = {
    "llava": {"num_hidden_layers": 3},
    "internvl": {"num_hidden_layers": 3},
    "qwen": {"depth": 5, "fullatt_block_indexes": [1, 4]},
}
"""Towers of several layers; Qwen's attends in windows of 2 x 2 tokens but for the second layer and the last."""

Oracle = list[tuple[Tensor, Tensor]]
"""Of each image: scores (T,) and keys (T, Ct) of its tokens."""


def deep(family: Family, **options: Any) -> Any:
    return family.build(tower=DEEP[family.name], **options)


def attentions(model: Any) -> list[Any]:
    """Attention modules of the tower's layers, wherever they are."""
    base = model.model
    if hasattr(base, "visual"):
        return [block.attn for block in base.visual.blocks]
    encoder = getattr(base.vision_tower, "vision_model", base.vision_tower).encoder
    if hasattr(encoder, "layer"):
        return [layer.attention for layer in encoder.layer]
    return [layer.self_attn for layer in encoder.layers]


def oracle(
    model: Any, inputs: dict[str, Tensor], layer: int, rows: str, dtype: torch.dtype = torch.float64
) -> Oracle:
    """Scores and keys of the images of a call, from the eager attention weights of a copy of the model."""
    model = copy.deepcopy(model).to(dtype)
    modules = attentions(model)
    modules[0].config._attn_implementation = "eager"
    home: Any = sys.modules[type(modules[0]).__module__]
    eager, calls = home.eager_attention_forward, []

    def recording(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = eager(module, query, key, *args, **kwargs)
        if module is modules[layer]:
            calls.append((weights.double(), key.double()))
        return out, weights

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(home, "eager_attention_forward", recording)
        if hasattr(model.model, "visual"):
            grid = inputs.get("image_grid_thw", inputs.get("video_grid_thw"))
            pixels = inputs.get("pixel_values", inputs.get("pixel_values_videos"))
            model.model.visual(pixels.to(dtype), grid_thw=grid)
            return _packed(model, calls, grid)
        model.model.vision_tower(inputs["pixel_values"].to(dtype))
    return _rows(model, *calls[0], rows)


def _rows(model: Any, weights: Tensor, key: Tensor, rows: str) -> Oracle:
    """weights (n, H, S, S), key (n, H, S, D): every picture is a row."""
    kind = model.config.vision_config.model_type
    by_class = rows == "class" and kind != "siglip_vision_model"
    found = []
    for picture in range(len(weights)):
        heads = weights[picture].mean(0)
        scores, keys = heads[0] if by_class else heads.mean(0), key[picture].mean(0)
        if model.config.vision_feature_select_strategy == "default":
            scores, keys = scores[1:], keys[1:]
        if kind == "internvl_vision":
            side = round(len(scores) ** 0.5)
            joined = [
                [(2 * i + a) * side + 2 * j + b for a in (0, 1) for b in (0, 1)]
                for i in range(side // 2)
                for j in range(side // 2)
            ]
            scores, keys = _means(scores, joined), _means(keys, joined)
        found.append((scores, keys))
    return found


def _packed(model: Any, calls: list[tuple[Tensor, Tensor]], grid: Tensor) -> Oracle:
    """A call of attention for each frame of each picture; four patches that stand side by side are a token, and tokens
    are in the order of the windows."""
    visual, found, frame = model.model.visual, [], 0
    for t, h, w in grid.tolist():
        frames = calls[frame : frame + t]
        frame += t
        scores = torch.cat([weights[0].mean(0).mean(0) / t for weights, _ in frames])
        keys = torch.cat([key[0].mean(0) for _, key in frames])
        joined = [list(range(4 * token, 4 * token + 4)) for token in range(t * h * w // 4)]
        scores, keys = _means(scores, joined), _means(keys, joined)
        if hasattr(visual, "window_size"):
            order = _window_index(visual, torch.tensor([[t, h, w]]))
            scores, keys = (torch.empty_like(x).index_copy_(0, order, x) for x in (scores, keys))
        found.append((scores, keys))
    assert frame == len(calls)
    return found


def _means(x: Tensor, joined: list[list[int]]) -> Tensor:
    return torch.stack([x[places].mean(0) for places in joined])


def _window_index(visual: Any, grid: Tensor) -> Tensor:
    """transformers' own order of tokens in windows."""
    if hasattr(visual, "get_window_index"):
        return torch.as_tensor(visual.get_window_index(grid)[0])
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(
        grid,
        spatial_merge_size=visual.spatial_merge_size,
        window_size=visual.window_size,
        patch_size=visual.patch_size,
    )[0]


def read_shorter(model: Any, family: Family, inputs: dict[str, Tensor], images: list[Any]) -> Tensor:
    """Logits (V,) after a prompt of one row, in float64 and without lightvlm, where ``images`` says of each image which
    tokens stay (n,) and what their features become (n, C): positions are those of a shorter prompt."""
    model = copy.deepcopy(model).double()
    embed, ids = model.get_input_embeddings(), inputs["input_ids"][0]
    left = iter(images)
    parts, at = [], 0
    is_image = (ids == model.config.image_token_id).tolist()
    while at < len(ids):
        end = at
        while end < len(ids) and is_image[end] == is_image[at]:
            end += 1
        parts.append(next(left)[1].double() if is_image[at] else embed(ids[at:end]))
        at = end
    embeds = torch.cat(parts)[None]
    positions = torch.arange(embeds.shape[1])[None]
    if family is QWEN:
        positions = positions.expand(3, 1, -1)
    with torch.no_grad():
        out = model.model.language_model(inputs_embeds=embeds, position_ids=positions)
        return model.lm_head(out.last_hidden_state)[0, -1]


def features(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the decoder gets of each image (T, C), in float64."""
    model = copy.deepcopy(model).double()
    names = ("pixel_values", "image_grid_thw", "image_sizes")
    given = {name: inputs[name] for name in names if name in inputs}
    given["pixel_values"] = given["pixel_values"].double()
    with torch.no_grad():
        found = model.model.get_image_features(**given)
    found = getattr(found, "pooler_output", found)
    return [x.double() for x in found]


__all__ = ["DEEP", "INTERNVL", "LLAVA", "QWEN", "attentions", "deep", "features", "oracle", "read_shorter"]
