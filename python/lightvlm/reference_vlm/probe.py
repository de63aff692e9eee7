"""The ceiling: what linear probes read from the frozen tower's image tokens when told where the digits are.

For each digit of a scene the probe sees the mean of the projected image tokens of the patches that its box
covers by half or more, standardised, and two linear classifiers (softmax regression) name the digit and the
colour. They are trained on training scenes and tested on test scenes. Each kind of question is then answered
from the probes' output
by rule, with the digits' places given:

- colour_to_digit: the digit of the one whose probability of the colour asked for is highest;
- digit_to_colour: the colour of the one whose probability of the digit asked for is highest;
- read: every digit's most probable value, from left to right;
- count: 1, since the places are given.

So the ceiling is what a decoder without faults of its own would score on this tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from .backgrounds import SIDE
from .questions import Question, score
from .scenes import NAMES, Scene
from .targets import patch_targets, pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlavaForConditionalGeneration


@dataclass
class Probe:
    """Softmax regressions on standardised features; `digit` and `colour` are (width + 1, classes)."""

    mean: torch.Tensor
    scale: torch.Tensor
    digit: torch.Tensor
    colour: torch.Tensor

    def __call__(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities of the 10 digits and of the 8 colours, (N, 10) and (N, 8), of features (N, width)."""
        inputs = _with_bias((features - self.mean) / self.scale)
        return (inputs @ self.digit).softmax(-1), (inputs @ self.colour).softmax(-1)


def _with_bias(features: torch.Tensor) -> torch.Tensor:
    return F.pad(features, (0, 1), value=1.0)


@torch.no_grad()
def digit_features(
    model: LlavaForConditionalGeneration, scenes: Sequence[Scene], batch_size: int = 32
) -> list[torch.Tensor]:
    """For each scene, the mean image token of each of its digits from left to right, (digits, width)."""
    features = []
    for start in range(0, len(scenes), batch_size):
        batch = scenes[start : start + batch_size]
        images = pixels(batch).to(model.device, model.dtype)
        tokens = torch.stack(list(model.model.get_image_features(images, return_dict=True).pooler_output))
        classes, centres = patch_targets(batch)
        for row, scene in enumerate(batch):
            means = []
            for digit in scene.digits:
                centre = torch.tensor([digit.x / SIDE, digit.y / SIDE])
                mine = (centres[row] == centre).all(-1) & (classes[row, :, 0] > 0)
                means.append(tokens[row, mine.to(tokens.device)].float().mean(0).cpu())
            features.append(torch.stack(means))
    return features


def _regression(inputs: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Softmax regression with a little weight decay, fitted by L-BFGS from zero."""
    weights = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weights, labels) + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def fit(model: LlavaForConditionalGeneration, scenes: Sequence[Scene]) -> Probe:
    """Fit the probes on scenes, which should be of the training split."""
    features = torch.cat(digit_features(model, scenes))
    mean, scale = features.mean(0), features.std(0) + 1e-6
    inputs = _with_bias((features - mean) / scale)
    digits = [digit for scene in scenes for digit in scene.digits]
    values = torch.tensor([digit.digit for digit in digits])
    colours = torch.tensor([NAMES.index(digit.colour) for digit in digits])
    return Probe(mean, scale, _regression(inputs, values, 10), _regression(inputs, colours, len(NAMES)))


def accuracy(probe: Probe, features: Sequence[torch.Tensor], scenes: Sequence[Scene]) -> tuple[float, float]:
    """Share of digits whose value, and whose colour, the probe names."""
    digit, colour = (p.argmax(-1).tolist() for p in probe(torch.cat(list(features))))
    truth = [d for scene in scenes for d in scene.digits]
    values = [guess == d.digit for guess, d in zip(digit, truth, strict=True)]
    colours = [NAMES[guess] == d.colour for guess, d in zip(colour, truth, strict=True)]
    return float(np.mean(values)), float(np.mean(colours))


def answer(probe: Probe, features: torch.Tensor, question: Question) -> str:
    """Answer a question about the scene of `features` (digits, width) by the rules above."""
    digit, colour = probe(features)
    if question.kind == "count":
        return str(len(features))
    if question.kind == "read":
        return " ".join(str(value) for value in digit.argmax(-1).tolist())
    asked = question.prompt.split()
    if question.kind == "colour_to_digit":
        which = next(NAMES.index(word) for word in asked if word in NAMES)
        return str(int(digit[colour[:, which].argmax()].argmax()))
    value = next(int(word) for word in asked if word.isdigit())
    return NAMES[int(colour[digit[:, value].argmax()].argmax())]


def ceiling(probe: Probe, features: Sequence[torch.Tensor], questions: Sequence[Question]) -> list[float]:
    """Scores of the probe's answers; `features[i]` belongs to the scene of question i."""
    return [score(q, answer(probe, f, q)) for f, q in zip(features, questions, strict=True)]
