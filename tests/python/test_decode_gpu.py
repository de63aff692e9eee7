"""The decode step on a GPU: captured by CUDA, replayed over compactions and packings, and never waiting."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache
from lightvlm.decode_step import DecodeStep
from python.test_decode_loop import PACKED, PLANS
from python.test_decode_step import tokens_of
from python.test_precision import LONG
from python.test_prefill import ROWS, prompt
from python.tiny import LLAVA, QWEN, Family
from torch import Tensor

import lightvlm_ext

pytestmark = pytest.mark.gpu
EVERY = {**PLANS, **PACKED}


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


def logits(
    model: Any, plan: lightvlm.Plan, dtype: torch.dtype, steps: int, capture: Any
) -> tuple[Tensor, Any]:
    rows = [*ROWS, *LONG]
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        cache = CompactCache(model.config)
        model(**on_gpu(prompt(LLAVA, rows, dtype)), past_key_values=cache)
        with DecodeStep(run, cache, ahead=steps, capture=capture) as decode:
            found = [decode.step(tokens_of(step, len(rows)).cuda()).clone() for step in range(steps)]
    return torch.stack(found), run.report()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_graph_leaves_the_bits_of_a_step(name: str, dtype: torch.dtype) -> None:
    """200 tokens: past two packings and many compactions."""
    model = LLAVA.build(dtype, head_dim=32).cuda()
    wanted, _ = logits(model, EVERY[name], dtype, 200, None)
    found, report = logits(model, EVERY[name], dtype, 200, "auto")
    assert torch.equal(found, wanted)
    assert report.stepped_aside == {}
    assert report.graph["captures"] <= 6
    assert report.graph["replays"] >= 200 - 2 * report.graph["captures"]
    assert lightvlm_ext.device_errors() == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=lambda family: family.name)
@pytest.mark.parametrize("name", ["none", "every-token"])
def test_generate_gives_the_models_tokens(family: Family, name: str, attention: str) -> None:
    """Heads of 8 channels: attention is SDPA over the whole buffer, masked by what the device knows."""
    model, inputs = family.build(attention=attention).cuda(), on_gpu(family.batch(ROWS))
    with lightvlm.attach(model, PLANS[name]) as run:
        wanted = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        found = lightvlm.generate(model, graph=True, **inputs, max_new_tokens=60, do_sample=False)
    assert torch.equal(found, wanted)
    assert run.report().stepped_aside == {}
    assert run.report().graph == {"captures": 1, "replays": 58}


@pytest.mark.parametrize("name", ["none", "every-eight", "packed"])
def test_a_replay_does_not_wait_for_the_device(name: str) -> None:
    model = LLAVA.build(torch.bfloat16, head_dim=32).cuda()
    with torch.no_grad(), lightvlm.attach(model, EVERY[name]) as run:
        cache = CompactCache(model.config)
        model(**on_gpu(prompt(LLAVA, LONG, torch.bfloat16)), past_key_values=cache)
        with DecodeStep(run, cache, ahead=40) as decode:
            tokens = tokens_of(0, 2).cuda()
            for _ in range(3):
                decode.step(tokens)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(20):  # with compactions among them
                    decode.step(tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert run.report().graph["replays"] >= 21
