"""attach and detach: what is refused, what is restored, and that keeping everything changes no bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.forward import Forward
from lightvlm.plan import Part
from python.tiny import DEPTH, LLAVA, QWEN, Family, Image, extend, generate, generate_logits, require_same
from torch import nn

ROWS = [[1, 2, Image(0), 3, 4, 5], [6, 7, 8], [1, Image(1), 9, Image(2), *range(10, 20)]]
KEEP_ALL = [
    lightvlm.Plan(),
    lightvlm.LightVLM(keep=1.0, decode_keep=None, min_image_tokens=0),
    lightvlm.Random(keep=1.0, min_image_tokens=0),
]
REDUCE = lightvlm.LightVLM(keep=0.3, min_image_tokens=0, decode_keep=0.4, decode_interval=4, decode_recent=4)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that attach could leave behind."""
    seen: dict[str, Any] = {"config": model.config.to_dict()}
    for name, module in model.named_modules():
        seen[f"{name}.names"] = sorted(vars(module))
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called)
        seen[f"{name}.hooks"] = [list(found) for found in hooks]
        seen[f"{name}.attention"] = getattr(getattr(module, "config", None), "_attn_implementation", None)
        seen[f"{name}.forward"] = "forward" in vars(module)
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_detach_restores_the_model(family: Family, attention: str) -> None:
    model = family.build(attention=attention)
    generate(model, family.batch(ROWS), 2)  # a model of transformers may set things at its first call
    before, weights = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    expected = generate_logits(model, family.batch(ROWS), 3)[1]
    with lightvlm.attach(model, REDUCE) as run:
        assert snapshot(model) != before
        assert run.attached
        generate(model, family.batch(ROWS), 6)
    assert not run.attached
    assert snapshot(model) == before
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert torch.equal(generate_logits(model, family.batch(ROWS), 3)[1], expected)
    run.detach()  # twice does no harm
    assert snapshot(model) == before


def test_detach_after_an_error_in_the_block(model: Any, family: Family) -> None:
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), lightvlm.attach(model, REDUCE):
        _ = 1 / 0
    assert snapshot(model) == before


@pytest.mark.parametrize("plan", KEEP_ALL, ids=["none", "lightvlm", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_is_bitwise_the_baseline(
    family: Family, attention: str, dtype: torch.dtype, plan: lightvlm.Plan
) -> None:
    model = family.build(dtype, attention)
    inputs = family.batch(ROWS, dtype)
    with torch.no_grad():
        expected = model(**inputs).logits
    tokens, logits = generate_logits(model, inputs, 5)
    with lightvlm.attach(model, plan) as run:
        with torch.no_grad():
            out = model(**inputs)
        assert torch.equal(out.logits, expected)
        found, found_logits = generate_logits(model, inputs, 5)
    assert type(out.past_key_values).__name__ == "DynamicCache"
    assert torch.equal(found, tokens)
    assert torch.equal(found_logits, logits)
    report = run.report()
    assert report.stepped_aside == {}
    assert report.flops_share == report.image_keep_share == 1.0
    assert report.kv_bytes_used == report.kv_bytes_allocated == report.kv_bytes_full > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_until_the_first_compaction_decoding_is_bitwise_the_baseline(
    family: Family, dtype: torch.dtype
) -> None:
    model = family.build(dtype)
    inputs = family.batch(ROWS, dtype)
    expected = generate_logits(model, inputs, 6)[1]
    with lightvlm.attach(model, lightvlm.LightVLM(keep=1, decode_keep=0.5, decode_interval=64)) as run:
        require_same(generate_logits(model, inputs, 6)[1], expected)
    assert run.report().compactions == 0


def test_text_alone_is_bitwise_the_baseline(model: Any, family: Family) -> None:
    inputs = family.batch([[1, 2, 3], [4, 5, 6, 7, 8]])
    expected = generate_logits(model, inputs, 5)[1]
    with lightvlm.attach(model, lightvlm.LightVLM(keep=0.2, decode_keep=None)) as run:
        assert torch.equal(generate_logits(model, inputs, 5)[1], expected)
    assert run.report().tokens_per_layer == [4.0] * 5


def test_attach_twice_is_refused(model: Any, family: Family) -> None:
    with lightvlm.attach(model, REDUCE) as run:
        attached = snapshot(model)
        with pytest.raises(ValueError, match="model is attached already; detach the other run first"):
            lightvlm.attach(model, lightvlm.Plan())
        assert snapshot(model) == attached
        assert run.attached
    with lightvlm.attach(model, REDUCE):
        pass


class _Precision(Part):
    slot, kind = "precision", "test"


def _text_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **options))


def _mistral() -> nn.Module:
    from transformers import MistralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    return LLAVA.build(
        config=MistralConfig(num_hidden_layers=2, num_key_value_heads=2, sliding_window=8, **sizes)
    )


@pytest.mark.parametrize(
    ("build", "plan", "error", "message"),
    [
        (lambda: "model", REDUCE, TypeError, "model must be a torch module, got str"),
        (LLAVA.build, "lightvlm", TypeError, "plan must be a lightvlm.Plan, got str"),
        (LLAVA.build, None, TypeError, "plan must be a lightvlm.Plan, got NoneType"),
        (LLAVA.build, REDUCE.prefill, TypeError, "plan must be a lightvlm.Plan, got LightVLMPrefill"),
        (
            _text_model,
            REDUCE,
            TypeError,
            "model is a LlamaForCausalLM, which lightvlm does not know; supported: InternVLForConditionalGeneration, ",
        ),
        (
            lambda: LLAVA.build().model,
            REDUCE,
            TypeError,
            "model is a LlavaModel, which lightvlm does not know",
        ),
        (
            lambda: QWEN.build(use_sliding_window=True, max_window_layers=2, sliding_window=8),
            REDUCE,
            ValueError,
            "model has decoder layers that are not full attention: sliding_attention",
        ),
        (
            _mistral,
            REDUCE,
            ValueError,
            "model has decoder layers that are not full attention: sliding_attention",
        ),
        (
            lambda: LLAVA.build(attention="flex_attention"),
            REDUCE,
            ValueError,
            "attention implementation 'flex_attention'; lightvlm works with eager, sdpa and flash attention",
        ),
        (
            LLAVA.build,
            lightvlm.Random(layers=(5,)),
            ValueError,
            r"layers must be ascending layer numbers within 0..4, got \(5,\)",
        ),
        (
            lambda: LLAVA.build(num_hidden_layers=1),
            REDUCE,
            ValueError,
            "layers must start at 1 or later: the score comes from the layer before",
        ),
        (
            LLAVA.build,
            lightvlm.Plan(precision=_Precision()),
            ValueError,
            "plan.precision is a _Precision, which this version does not know",
        ),
    ],
)
def test_what_attach_refuses(
    build: Callable[[], Any], plan: Any, error: type[Exception], message: str
) -> None:
    model = build()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        lightvlm.attach(model, plan)
    assert before is None or snapshot(model) == before


def test_a_subclass_is_known(llava: Any) -> None:
    class Mine(type(llava)):  # type: ignore[misc]
        pass

    model = LLAVA.build()
    model.__class__ = Mine
    with lightvlm.attach(model, REDUCE):
        assert generate(model, LLAVA.batch(ROWS), 2).shape == (3, 2)


def test_attention_set_while_attached_is_an_error(family: Family) -> None:
    model = family.build()
    inputs = family.batch(ROWS)
    with lightvlm.attach(model, REDUCE):
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="attention was set to 'eager' while a run is attached"):
            generate(model, inputs, 2)
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert generate(model, inputs, 2).shape == (3, 2)


def test_our_attention_without_a_run_is_an_error(llava: Any) -> None:
    model = LLAVA.build()
    with lightvlm.attach(model, REDUCE):
        pass
    model.model.language_model.config._attn_implementation = "lightvlm_sdpa"
    with pytest.raises(RuntimeError, match="no run is attached"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_two_models_at_once(llava: Any, qwen: Any) -> None:
    with lightvlm.attach(llava, REDUCE) as first, lightvlm.attach(qwen, lightvlm.Plan()) as second:
        for _ in range(2):
            generate(llava, LLAVA.batch(ROWS), 2)
            generate(qwen, QWEN.batch(ROWS[:1]), 2)
    assert first.report().prefills == 6
    assert first.report().op_calls["select_diverse"] == 6
    assert second.report().prefills == 2
    assert second.report().op_calls == {}


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_the_model_leaves_it_usable(
    model: Any, family: Family, interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = family.batch(ROWS)

    def fail(*args: Any) -> Any:
        raise interrupt("stop")

    with lightvlm.attach(model, REDUCE) as run:
        expected = generate(model, inputs, 6)
        assert run._forward == Forward()
        calls = run.report().op_calls
        with monkeypatch.context() as patch:
            patch.setattr(model.model.language_model.layers[3].mlp, "forward", fail)
            with pytest.raises(interrupt, match="stop"):
                generate(model, inputs, 6)
        failed = run.report()
        # hooks run after an Exception; what any other leaves behind, the next call drops
        assert (run._forward == Forward()) == issubclass(interrupt, Exception)
        assert torch.equal(generate(model, inputs, 6), expected)
        assert run._forward == Forward()
        again = run.report()
    assert failed.prefills == 3
    assert again.prefills == 6
    for name in calls:  # counted once, by one observer
        assert again.op_calls[name] - failed.op_calls[name] == calls[name]


def test_an_error_of_the_model_about_its_inputs_comes_through(llava: Any) -> None:
    inputs = LLAVA.batch(ROWS)
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with lightvlm.attach(llava, REDUCE) as run:
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            llava(**inputs)
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            llava()
        assert generate(llava, LLAVA.batch(ROWS), 2).shape == (3, 2)
    assert run.report().prefills == 3


def test_labels(model: Any, family: Family) -> None:
    inputs = family.batch(ROWS[:1])
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
    with lightvlm.attach(model, REDUCE):
        with pytest.raises(ValueError, match="labels cannot be used while a plan shortens the sequence"):
            model(**inputs, labels=labels)
        assert generate(model, inputs, 2).shape == (1, 2)
    with torch.no_grad(), lightvlm.attach(model, lightvlm.LightVLM(keep=1, decode_keep=None)):
        assert torch.equal(model(**inputs, labels=labels).loss, expected)


def test_labels_by_position(llava: Any) -> None:
    inputs = LLAVA.batch(ROWS[:1])
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    rest = (None, None, None, None, None)  # position_ids ... vision_feature_select_strategy
    with lightvlm.attach(llava, REDUCE), pytest.raises(ValueError, match="labels cannot be used"):
        llava(ids, pixels, mask, *rest, ids)


def test_gradient_modes_do_not_matter(model: Any, family: Family) -> None:
    inputs = family.batch(ROWS)
    token = torch.tensor([[3]] * 3)
    found = []
    with lightvlm.attach(model, REDUCE):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                out = model(**inputs)
                cache = out.past_key_values
            # what one mode has filled another goes on with
            more, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=cache)
            assert not cache.layers[0].key_storage.requires_grad
            found.append((out.logits.detach().clone(), more.logits.detach()))
    for logits, more in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert torch.equal(more, found[0][1])


def test_generate_in_another_thread(llava: Any) -> None:
    """As with a streamer that the main thread reads from."""
    inputs, found = LLAVA.batch(ROWS), []
    with lightvlm.attach(llava, REDUCE) as run:
        expected = generate(llava, inputs, 5)
        calls = run.report().op_calls
        thread = threading.Thread(target=lambda: found.append(generate(llava, inputs, 5)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
    assert run.report().op_calls == {name: 2 * count for name, count in calls.items()}


def test_flash_attention_finds_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers chooses the flash package by the name in the module's configuration."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = []

    def flash(module: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    model = LLAVA.build()
    config = model.model.language_model.config
    config._attn_implementation = "flash_attention_2"
    inputs = LLAVA.batch([[1, Image(1), 5, 6]])
    expected = generate(model, inputs, 3)
    with lightvlm.attach(model, lightvlm.LightVLM(keep=0.5, layers=(2,), min_image_tokens=0)):
        assert config._attn_implementation == "lightvlm_flash_attention_2"
        generate(model, inputs, 3)
    assert set(names) == {"flash_attention_2"}
    assert len(names) > 2 * DEPTH
    assert torch.equal(generate(model, inputs, 3), expected)
