"""The auxiliary head of training: what each projected image token shows, read by one linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .backgrounds import SIDE
from .scenes import NAMES, Scene
from .targets import patch_targets

if TYPE_CHECKING:
    from collections.abc import Sequence


class PatchHead(nn.Module):
    """Linear head: digit (none or 0-9), colour (none or 8) and digit centre from one image token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, 11 + 1 + len(NAMES) + 2)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        digit, colour, centre = self.linear(self.norm(tokens)).float().split([11, 1 + len(NAMES), 2], -1)
        return digit, colour, centre


def auxiliary_loss(
    head: PatchHead, tokens: torch.Tensor, scenes: Sequence[Scene]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of the patch head and its accuracy on patches of digits; `tokens` is (B, 256, width)."""
    classes, centres = (x.to(tokens.device) for x in patch_targets(scenes))
    digit, colour, centre = head(tokens)
    inside = classes[..., 0] > 0
    # Background patches are ten times as many as those of one digit.
    digit_weight = torch.tensor([0.15] + [1.0] * 10, device=tokens.device)
    colour_weight = torch.tensor([0.15] + [1.0] * len(NAMES), device=tokens.device)
    loss = F.cross_entropy(digit.flatten(0, 1), classes[..., 0].flatten(), digit_weight)
    loss = loss + 0.5 * F.cross_entropy(colour.flatten(0, 1), classes[..., 1].flatten(), colour_weight)
    loss = loss + 3.0 * F.l1_loss(centre[inside], centres[inside])
    right = (digit.argmax(-1) == classes[..., 0])[inside].float().mean()
    hue = (colour.argmax(-1) == classes[..., 1])[inside].float().mean()
    return loss, {"patch_digit": right.item(), "patch_colour": hue.item()}


@torch.no_grad()
def glyph_accuracy(head: PatchHead, tokens: torch.Tensor, scenes: Sequence[Scene]) -> list[bool]:
    """Whether the digit head, averaged over each digit's patches, names the digit; one entry per digit."""
    classes, centres = patch_targets(scenes)
    log_probabilities = head(tokens)[0][..., 1:].log_softmax(-1).cpu()
    right = []
    for row, scene in enumerate(scenes):
        for digit in scene.digits:
            centre = torch.tensor([digit.x / SIDE, digit.y / SIDE])
            mine = (centres[row] == centre).all(-1) & (classes[row, :, 0] > 0)
            right.append(int(log_probabilities[row, mine].mean(0).argmax()) == digit.digit)
    return right
