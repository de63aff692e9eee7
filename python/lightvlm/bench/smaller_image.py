"""The baseline that needs no method: a smaller picture.

The scene is resized to fewer patches, the vision tower interpolates its position embeddings (transformers'
``interpolate_pos_encoding``), and the prompt has as many placeholders as there are patches. All layers have fewer
tokens, so a method has to be better than this at the same FLOPs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from .fidelity_questions import Questions, Result
from .fidelity_rows import Row, without_plan
from .prompts import Prompts

if TYPE_CHECKING:
    from ..reference_vlm.scenes import Scene

NAME = "smaller image"
"""What its rows have for a method."""


@torch.no_grad()
def smaller(questions: Questions, model: Any, processor: Any, side: int) -> Questions:
    """The same questions, already prepared, about pictures of ``side`` x ``side`` patches.

    Raises:
        ValueError: a side that the full picture does not have; a transformers whose generate() takes pixels alone.
    """
    from ..reference_vlm.build import GRID, IMAGE_TOKENS

    if not 1 <= side <= GRID:
        raise ValueError(f"--smaller-image must be from 1 to {GRID} patches a side, got {side}")
    made = copy.copy(questions)
    made.batches = []
    encoded: dict[int, Any] = {}
    for kind, part, inputs in questions.batches:
        if "mm_encoder_outputs" not in inputs:
            raise ValueError("--smaller-image needs a transformers whose generate() takes encoded pictures")
        if part.start not in encoded:
            pixels = _resized(questions.scenes[part], processor, side).to(model.device, model.dtype)
            encoded[part.start] = model.get_image_features(
                pixel_values=pixels, interpolate_pos_encoding=True, return_dict=True
            )
        images = inputs["input_ids"] == model.config.image_token_id
        stays = ~(images & (images.cumsum(1) <= IMAGE_TOKENS - side * side))
        cut = {
            name: value[stays].reshape(len(value), -1)
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.shape == stays.shape
        }
        made.batches.append(
            (kind, part, {**inputs, **cut, "mm_encoder_outputs": {"image": encoded[part.start]}})
        )
    return made


def measure(
    case: str,
    side: int,
    budget: str,
    target: float,
    asked: Questions,
    full: Result,
    prompts: Prompts,
    model: Any,
    processor: Any,
) -> Row:
    """The row of a smaller picture."""
    baseline = asked.full_prefill(model, False)
    result = smaller(asked, model, processor, side).ask(model, processor, None)
    row = without_plan(case, NAME, result, full, asked, side * side, baseline)
    share = prompts.share_of(side * side)
    keep = side * side / model.config.image_seq_length
    row |= {"budget": budget, "target": target, "side": side, "flops_share": share}
    row["keep"] = row["image_keep_share"] = keep
    row["kv_share"] = prompts.tokens_share_of(side * side)
    row["reached"] = share if budget == "flops" else target
    if budget == "flops" and abs(share - target) > prompts.one_token:
        row["off_target"] = f"comes no nearer than {share:.3f}"
    return row


def _resized(scenes: Sequence[Scene], processor: Any, side: int) -> Tensor:
    """Pixels (N, 3, side * patch, side * patch), as the processor normalises them."""
    from ..reference_vlm.build import PATCH

    images = [
        Image.fromarray(scene.image).resize((side * PATCH, side * PATCH), Image.Resampling.BICUBIC)
        for scene in scenes
    ]
    unchanged = {"do_resize": False, "do_center_crop": False}
    pixels: Tensor = processor.image_processor(images=images, return_tensors="pt", **unchanged)[
        "pixel_values"
    ]
    return pixels


def sides(
    given: Sequence[int] | None, targets: Sequence[float], prompts: Prompts
) -> list[tuple[int, str, float]]:
    """Patches a side, budget and target of each row: those of --smaller-image, or with none the ones nearest to each
    share of --flops.

    Raises:
        ValueError: neither is given.
    """
    from ..reference_vlm.build import GRID

    if given is None:
        return []
    if given:
        return [(side, "side", float(side)) for side in given]
    if not targets:
        raise ValueError("--smaller-image needs SIDE, or --flops to choose it by")

    def off(side: int, target: float) -> float:
        return abs(prompts.share_of(side * side) - target)

    return [
        (min(range(1, GRID + 1), key=lambda side: off(side, target)), "flops", target) for target in targets
    ]
