"""Tokens that are numbered anew after a stage: what is left is a shorter prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.base import PrefillPart, Reduced, Stage, StageInput, pyramid_stages
from lightvlm.plan import Plan
from python.test_prefill import ROWS, noise
from python.tiny import IMAGE_ID, LLAVA, NEWER, Family, Image, generate, generate_logits

from lightvlm_ext import ops


@dataclass(frozen=True)
class EveryOther(PrefillPart):
    """Every other image token goes, before the first layer."""

    kind = "every_other"
    keep: float = 0.5
    layer: int = 0
    min_image_tokens: int = 0
    positions: str = "renumber"

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, (self.layer,), None, lambda depth: (self.layer,))

    def reduce(self, stage: StageInput) -> Reduced:
        even = 1 - (stage.within % 2).float()
        chosen = ops.select(
            even, keep=stage.keep, forced=stage.text, segment=stage.segment, capacity=stage.capacity
        )
        return Reduced(chosen, ops.gather_tokens(stage.hidden, chosen.index, chosen.count, align="right"))


ROWS_OF_EVEN = [[1, 2, Image(1), 5, 6, 7], [9, 8, 7, 6], [4, Image(2), 1, Image(3), 2, 3]]
PLAN = Plan(prefill=EveryOther())


@pytest.fixture(params=[1, 4], ids=["alone", "beams"])
def beams(request: pytest.FixtureRequest) -> int:
    return request.param


def shorter(model: Any, family: Family, row: Any) -> dict[str, torch.Tensor]:
    """The prompt with every other image token cut out of its embeddings."""
    inputs = family.batch([row])
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).clone()
    pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
    if pixels:
        features = model.model.get_image_features(**pixels)
        images = torch.cat(list(getattr(features, "pooler_output", features))).reshape(-1, embeds.shape[-1])
        embeds[ids == IMAGE_ID] = images
    left = torch.ones_like(ids, dtype=torch.bool)
    at = 0
    for item in row:
        if isinstance(item, Image):
            left[0, at + 1 : at + item.tokens : 2] = False
        at += item.tokens if isinstance(item, Image) else 1
    embeds = embeds[left][None]
    return {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}


def test_a_shorter_prompt_is_what_is_left(model: Any, family: Family, beams: int) -> None:
    """A padded batch with all kinds of rows against the model itself, which never saw the others' tokens."""
    with lightvlm.attach(model, PLAN):
        tokens = generate(model, family.batch(ROWS_OF_EVEN), 12, num_beams=beams)
    for b, row in enumerate(ROWS_OF_EVEN):
        if beams > 1 and sum(isinstance(item, Image) for item in row) > 1 and not NEWER:
            continue
        with torch.no_grad():
            expected = generate(model, shorter(model, family, row), 12, num_beams=beams)
        assert torch.equal(tokens[b], expected[0])


def test_logits_of_a_shorter_prompt(model: Any, family: Family) -> None:
    limit = 4 * noise(model, family, ROWS) + 1e-5
    row = ROWS_OF_EVEN[2]
    with lightvlm.attach(model, PLAN):
        found = generate_logits(model, family.batch([row]), 6)[1]
    with torch.no_grad():
        out = model.generate(
            **shorter(model, family, row),
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert (found - torch.stack(out.logits, dim=1)).abs().max() <= limit


def test_the_decode_loop_numbers_alike(model: Any, family: Family) -> None:
    plan = Plan(prefill=EveryOther(layer=2))
    inputs = family.batch(ROWS_OF_EVEN[:1])
    with lightvlm.attach(model, plan):
        expected = model.generate(**inputs, max_new_tokens=9, do_sample=False)
        found = lightvlm.generate(model, **family.batch(ROWS_OF_EVEN[:1]), max_new_tokens=9, do_sample=False)
    assert torch.equal(found, expected)


def test_drafts_are_numbered_alike(llava: Any) -> None:
    """Assisted decoding verifies several tokens at once and takes some back."""
    inputs = LLAVA.batch(ROWS_OF_EVEN[:1])
    with lightvlm.attach(llava, Plan(prefill=EveryOther(layer=2))):
        expected = generate(llava, inputs, 12)
        found = generate(llava, inputs, 12, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", ["renumber", "renumber_prompt"])
def test_padding_counts_where_the_caller_counts_it(llava: Any, how: str) -> None:
    """forward() without position_ids counts padding: answers stand as far from the prompt as they do without it."""
    plan = Plan(prefill=EveryOther(layer=2, positions=how))
    with torch.no_grad(), lightvlm.attach(llava, plan):
        together = llava(**LLAVA.batch(ROWS_OF_EVEN), logits_to_keep=2).logits
        for row, found in zip(ROWS_OF_EVEN, together, strict=True):
            alone = llava(**LLAVA.batch([row]), logits_to_keep=2).logits[0]
            assert (found - alone).abs().max() <= 1e-4


def test_numbering_matters(llava: Any) -> None:
    """The tests above could not fail if positions did not matter."""
    found = {}
    for how in ("keep", "renumber", "renumber_prompt"):
        with lightvlm.attach(llava, Plan(prefill=EveryOther(positions=how))):
            found[how] = generate_logits(llava, LLAVA.batch(ROWS_OF_EVEN[:1]), 4)[1]
    assert (found["keep"] - found["renumber"])[:, 0].abs().max() > 0.01
    assert torch.equal(found["renumber"][:, 0], found["renumber_prompt"][:, 0])
    assert (found["renumber"] - found["renumber_prompt"])[:, 1].abs().max() > 0.01
