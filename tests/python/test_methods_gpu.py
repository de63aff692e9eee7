"""Every method on a GPU: what it keeps and says there is what it does on the CPU, and the host waits for nothing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.base import PrefillPart
from python.tiny import Family, generate_logits

from python import matrix

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(small: Any) -> Any:
    """The small model of a family, on the device."""
    return copy.deepcopy(small).cuda()


def run(model: Any, family: Family, plan: lightvlm.Plan, device: str) -> tuple[Any, Any, Any]:
    inputs = {
        name: value.to(device) for name, value in family.batch(matrix.rows_of(family), model.dtype).items()
    }
    with lightvlm.attach(model, plan, trace=True) as attached:
        tokens, logits = generate_logits(model, inputs, 6)
    return tokens.cpu(), logits.float().cpu(), attached


@pytest.mark.parametrize("name", matrix.NAMES)
def test_a_gpu_does_what_the_cpu_does(small: Any, on_gpu: Any, family: Family, name: str) -> None:
    plan = matrix.plan_of(name)
    limit = 8 * matrix.limit_of(small, family)  # sums in other orders on both sides
    tokens, logits, here = run(small, family, plan, "cpu")
    others, found, there = run(on_gpu, family, plan, "cuda")
    assert there.kept == here.kept
    assert there.report().tokens_per_layer == here.report().tokens_per_layer
    assert there.report().errors == []
    assert torch.equal(others, tokens)
    assert (found - logits).abs().max() <= limit


@pytest.mark.parametrize("name", matrix.NAMES)
def test_half_precision_is_finite(small_bf16: Any, family: Family, name: str) -> None:
    model = copy.deepcopy(small_bf16).cuda()
    assert run(model, family, matrix.plan_of(name), "cuda")[1].isfinite().all()


@pytest.mark.parametrize(
    "name", [name for name in matrix.NAMES if isinstance(matrix.plan_of(name).prefill, PrefillPart)]
)
def test_the_host_does_not_wait_between_layers(on_gpu: Any, family: Family, name: str) -> None:
    """torch's own watch over synchronisation, while the decoder's layers run."""
    decoder = on_gpu.model.language_model
    inputs = {key: value.cuda() for key, value in family.batch(matrix.rows_of(family)).items()}
    waits: list[str] = []

    def watch(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn")

    def rest(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    with torch.no_grad(), lightvlm.attach(on_gpu, matrix.plan_of(name)):
        on_gpu(**inputs)  # kernels are loaded, buffers pinned
        handles = [
            decoder.layers[0].register_forward_pre_hook(watch),
            decoder.layers[-1].register_forward_hook(rest),
        ]
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                on_gpu(**inputs)
            waits = [str(one.message) for one in caught if "synchroniz" in str(one.message)]
        finally:
            rest()
            for handle in handles:
                handle.remove()
    assert waits == []
