"""A decode step asks the host for nothing: it is captured, replayed on other values, and captured anew if it must."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache, decode_step
from lightvlm.decode_step import DecodeStep, capture_on
from python.recorded import record
from python.test_decode_loop import PACKED, PLANS
from python.test_precision import LONG
from python.test_prefill import ROWS, prompt
from python.tiny import DEPTH, LLAVA, QWEN, Family, Image, extend
from torch import Tensor

EVERY = {**PLANS, **PACKED}
torch_graph = torch.cuda.graph


@pytest.fixture(scope="module")
def wide() -> Any:
    """Heads of 32 channels, which decode_attention takes."""
    return LLAVA.build(head_dim=32)


def read_prompt(model: Any, run: lightvlm.Run, rows: Any, **options: Any) -> Any:
    """Output of forward(), on a CompactCache whatever the plan."""
    cache = CompactCache(model.config, **options)
    with torch.no_grad():
        return model(**prompt(LLAVA, rows), past_key_values=cache)


def tokens_of(step: int, rows: int) -> Tensor:
    return torch.tensor([[10 + (step + 3 * row) % 40] for row in range(rows)])


class Counting:
    """Captures, and counts how often."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, function: Callable[[], Tensor]) -> Any:
        self.captures += 1
        return record(function)


def steps_of(model: Any, plan: lightvlm.Plan, rows: Any, steps: int, **options: Any) -> list[Tensor]:
    with lightvlm.attach(model, plan) as run:
        cache = read_prompt(model, run, rows).past_key_values
        with DecodeStep(run, cache, ahead=steps, **options) as decode:
            return [decode.step(tokens_of(step, len(rows))).clone() for step in range(steps)]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("rows", [[*ROWS, *LONG], LONG[:1]], ids=["batch", "row"])
def test_a_replay_leaves_the_bits_of_a_step(wide: Any, name: str, rows: Any) -> None:
    plain = steps_of(wide, EVERY[name], rows, 90, capture=None)
    replayed = steps_of(wide, EVERY[name], rows, 90, capture=record)
    assert all(torch.equal(*pair) for pair in zip(plain, replayed, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_steps_are_calls_of_the_model(wide: Any, name: str) -> None:
    """The same logits from forward(), whose attention is transformers' own where a layer is whole."""
    rows = [*ROWS, *LONG]
    found = steps_of(wide, EVERY[name], rows, 24)
    with torch.no_grad(), lightvlm.attach(wide, EVERY[name]) as run:
        out, mask = read_prompt(wide, run, rows), LLAVA.batch(rows)["attention_mask"]
        for step in range(24):
            cache = out.past_key_values
            out, mask = extend(LLAVA, wide, mask, tokens_of(step, len(rows)), past_key_values=cache)
            torch.testing.assert_close(found[step], out.logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_the_device_needs_nothing_that_the_host_knows_of_the_rows(wide: Any, name: str) -> None:
    """Lists of the host are taken away while the device's part of a step runs, and its counts are wrong."""
    rows, wrong = [*ROWS, *LONG], {"starts": None, "ends": None, "seen": 10**6, "tail": -1}
    expected = steps_of(wide, EVERY[name], rows, 70, capture=None)
    with torch.no_grad(), lightvlm.attach(wide, EVERY[name]) as run:
        cache = read_prompt(wide, run, rows).past_key_values
        with DecodeStep(run, cache, ahead=70, capture=None) as decode:
            device = decode._compute

            def poisoned() -> Tensor:
                known = [{name: layer.__dict__[name] for name in wrong} for layer in cache.layers]
                for layer in cache.layers:
                    layer.__dict__.update(wrong)
                try:
                    return device()
                finally:
                    for layer, values in zip(cache.layers, known, strict=True):
                        layer.__dict__.update(values)

            decode._compute = poisoned  # type: ignore[method-assign]
            for step in range(70):
                assert torch.equal(decode.step(tokens_of(step, len(rows))), expected[step])


def test_it_is_captured_again_only_where_buffers_were_replaced(wide: Any) -> None:
    captured = {}
    for name in ("none", "every-token", "every-eight", "queries", "packed", "packed-budget"):
        count = Counting()
        steps_of(wide, EVERY[name], LONG, 200, capture=count)
        captured[name] = count.captures
    # generated tokens are packed for the first time after 64 of them, into storage that has room for all
    expected = {"none": 1, "every-token": 1, "every-eight": 1, "queries": 1, "packed": 2, "packed-budget": 2}
    assert captured == expected


def test_compaction_keeps_the_addresses(wide: Any) -> None:
    """And what a step finds on the device is what the host counts."""
    with torch.no_grad(), lightvlm.attach(wide, PLANS["every-eight"]) as run:
        cache = read_prompt(wide, run, LONG).past_key_values
        with DecodeStep(run, cache, ahead=40) as decode:
            before, held = decode._live.addresses(), [layer.bounds()[1] for layer in cache.layers]
            for step in range(40):
                decode.step(tokens_of(step, 2))
                assert decode._live.addresses() == before
                assert [ends.tolist() for ends in held] == [layer.ends for layer in cache.layers]
                assert [layer.bounds()[0].tolist() for layer in cache.layers] == [
                    layer.starts for layer in cache.layers
                ]
    assert run.report().compactions == 5
    assert all(layer.live is None for layer in cache.layers)


def test_longer_answers_than_expected_grow_the_buffers(wide: Any) -> None:
    """As where no answer of such length was asked for: buffers move, and the step is captured again."""
    count = Counting()
    with torch.no_grad(), lightvlm.attach(wide, PLANS["none"]) as run:
        cache = read_prompt(wide, run, LONG).past_key_values
        with DecodeStep(run, cache, ahead=2, capture=count) as decode:
            found = [decode.step(tokens_of(step, 2)).clone() for step in range(300)]
    assert count.captures == 3
    expected = steps_of(wide, PLANS["none"], LONG, 300, capture=None)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_capture_that_fails(wide: Any) -> None:
    with torch.no_grad(), lightvlm.attach(wide, PLANS["none"]) as run:
        cache = read_prompt(wide, run, LONG).past_key_values
        with DecodeStep(run, cache, capture=lambda function: 1 / 0) as decode:
            for step in range(4):
                decode.step(tokens_of(step, 2))
    report = run.report()
    assert report.graph == {}
    assert report.stepped_aside == {"the decode step cannot be captured: division by zero": 1}
    assert cache.get_seq_length() == LLAVA.batch(LONG)["input_ids"].shape[1] + 4


def test_a_read_in_a_layer_is_refused_by_the_recording(wide: Any) -> None:
    """What a capture would refuse does not pass unseen here, and the tokens are right all the same."""
    expected = steps_of(wide, PLANS["none"], LONG, 5)
    reads: list[Callable[[Tensor], object]] = [
        lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x.tolist(), lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0]) * 0, lambda x: x.cpu(),
    ]  # fmt: skip
    for read in reads:
        with torch.no_grad(), lightvlm.attach(wide, PLANS["none"]) as run:
            cache = read_prompt(wide, run, LONG).past_key_values
            handle = wide.model.language_model.layers[2].register_forward_pre_hook(
                lambda module, args, read=read: (read(args[0]), None)[1]
            )
            try:
                with DecodeStep(run, cache, ahead=5, capture=record) as decode:
                    found = [decode.step(tokens_of(step, 2)).clone() for step in range(5)]
            finally:
                handle.remove()
        (reason,) = run.report().stepped_aside
        assert "cannot be captured" in reason
        assert "is not permitted while a step is captured" in reason
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_ops_and_time_of_replays_are_in_the_report(wide: Any) -> None:
    with torch.no_grad(), lightvlm.attach(wide, PLANS["none"]) as run:
        cache = read_prompt(wide, run, LONG).past_key_values
        with DecodeStep(run, cache, capture=record) as decode:
            for step in range(6):
                decode.step(tokens_of(step, 2))
    report = run.report()
    assert report.op_calls["append_attend_"] == 6 * DEPTH
    assert report.graph == {"captures": 1, "replays": 5}
    assert report.seconds["decode"] > 0
    assert report.kv_bytes_used == cache.kv_bytes_used
    assert [line for line in str(report).splitlines() if line.startswith("decode steps from a CUDA graph ")]
    assert "  5, captured 1x" in str(report)


def test_positions_of_ones_own(qwen: Any) -> None:
    """Three axes; without them the next token follows those seen, which here is wrong."""
    inputs = QWEN.batch([[1, Image(0), 2, 3], [4, 5]])
    mask = inputs["attention_mask"]
    with torch.no_grad(), lightvlm.attach(qwen, lightvlm.Plan()) as run:
        cache = CompactCache(qwen.config)
        qwen(**inputs, past_key_values=cache)
        tokens = torch.tensor([[7], [8]])
        positions = QWEN.positions(qwen, torch.cat([mask, torch.ones_like(tokens)], dim=1), 1)
        with DecodeStep(run, cache, positions=positions) as decode:
            found = decode.step(tokens).clone()
        cache = CompactCache(qwen.config)
        qwen(**inputs, past_key_values=cache)
        expected, _ = extend(QWEN, qwen, mask, tokens, past_key_values=cache)
    torch.testing.assert_close(found, expected.logits[:, -1], rtol=1e-4, atol=1e-4)


def test_how_cuda_is_asked_to_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CUDA that only notes what it is asked: one stream a device, capture and replay on that device, and the
    caller's stream around the capture, which would not bring it back where it fails."""
    device, asked = torch.device("cuda", 3), []

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    @contextlib.contextmanager
    def noted(name: str, *args: Any, **options: Any) -> Iterator[None]:
        asked.append((name, *(arg for arg in args if not isinstance(arg, Graph)), options))
        yield
        asked.append(f"end of {name}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"caller's of {device}")
    monkeypatch.setattr(torch.cuda, "stream", functools.partial(noted, "stream"))
    monkeypatch.setattr(torch.cuda, "device", functools.partial(noted, "device"))
    monkeypatch.setattr(torch.cuda, "graph", functools.partial(noted, "graph"))
    monkeypatch.setattr(decode_step, "_streams", {})
    capture = capture_on(device)
    assert capture is not None
    out, replay = capture(lambda: torch.tensor(5))
    options = {"stream": "stream of cuda:3", "capture_error_mode": "thread_local"}
    assert set(options) < set(inspect.signature(torch_graph).parameters)
    assert out == 5
    opened = [("device", device, {}), ("stream", "caller's of cuda:3", {}), ("graph", options)]
    assert asked == [*opened, "end of graph", "end of stream", "end of device"]
    asked.clear()
    replay()
    assert asked == [("device", device, {}), "replay", "end of device"]
    assert capture_on(torch.device("cpu")) is None


def refusals(model: Any) -> dict[str, Callable[[lightvlm.Run, CompactCache], Any]]:
    def detached(run: lightvlm.Run, cache: CompactCache) -> Any:
        run.detach()
        return cache

    def stepped(run: lightvlm.Run, cache: CompactCache) -> Any:
        DecodeStep(run, cache)
        return cache

    def paged(run: lightvlm.Run, cache: CompactCache) -> Any:
        pages = lightvlm.KVPages(model.config, pages=200, page_size=16)
        in_pages = lightvlm.PagedCompactCache(model.config, pages=pages)
        with torch.no_grad():
            return model(**prompt(LLAVA, LONG), past_key_values=in_pages).past_key_values

    return {
        "the run is detached": detached,
        "its keys are in pages, which grow by the host's hand": paged,
        "a dict holds the keys, not a CompactCache": lambda run, cache: {},
        "it is empty": lambda run, cache: CompactCache(model.config),
        "it is being stepped already": stepped,
    }


@pytest.mark.parametrize("reason", list(refusals(None)))
def test_refused(wide: Any, reason: str) -> None:
    with lightvlm.attach(wide, PLANS["none"]) as run:
        cache = read_prompt(wide, run, LONG).past_key_values
        cache = refusals(wide)[reason](run, cache)
        with pytest.raises(ValueError, match=f"cache cannot be stepped: {reason}"):
            DecodeStep(run, cache)


def test_bad_arguments(wide: Any) -> None:
    with lightvlm.attach(wide, PLANS["none"]) as run:
        cache = read_prompt(wide, run, LONG).past_key_values
        with pytest.raises(ValueError, match=r"positions must end in \(2, 1\), got \(2, 3\)"):
            DecodeStep(run, cache, positions=torch.zeros(2, 3))
        with pytest.raises(ValueError, match="capture must be \"auto\", None or a function, got 'yes'"):
            DecodeStep(run, cache, capture="yes")
        with DecodeStep(run, cache) as decode:
            for tokens in (torch.zeros(1, 1, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)):
                with pytest.raises(ValueError, match=r"tokens must be \(2, 1\) integers"):
                    decode.step(tokens)
            with pytest.raises(
                ValueError, match=r"tokens must be \(2, 1\) integers, got \(2, 1\) torch.float32"
            ):
                decode.step(torch.zeros(2, 1))
    assert cache.get_seq_length() == LLAVA.batch(LONG)["input_ids"].shape[1]


def test_an_interrupted_step_is_as_if_it_had_not_been(wide: Any) -> None:
    expected = steps_of(wide, PLANS["none"], LONG, 3)
    with lightvlm.attach(wide, PLANS["none"]) as run:
        cache = read_prompt(wide, run, LONG).past_key_values
        with DecodeStep(run, cache) as decode:
            found = [decode.step(tokens_of(0, 2)).clone()]
            handle = wide.lm_head.register_forward_pre_hook(lambda module, args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                decode.step(tokens_of(1, 2))
            handle.remove()
            found += [decode.step(tokens_of(step, 2)).clone() for step in (1, 2)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_another_runs_cache_is_refused(wide: Any) -> None:
    with lightvlm.attach(wide, PLANS["none"]) as run:
        cache = read_prompt(wide, run, LONG).past_key_values
    with (
        lightvlm.attach(wide, PLANS["none"]) as other,
        pytest.raises(ValueError, match="another run filled it, or none"),
    ):
        DecodeStep(other, cache)


def test_steps_in_inference_mode_and_out_of_it(wide: Any) -> None:
    for name in ("queries", "every-eight"):
        expected = steps_of(wide, EVERY[name], LONG, 12)
        with lightvlm.attach(wide, EVERY[name]) as run, torch.inference_mode():
            cache = read_prompt(wide, run, LONG).past_key_values
            decode = DecodeStep(run, cache, capture=None)
            found = [decode.step(tokens_of(step, 2)).clone() for step in range(3)]
            with torch.inference_mode(False):
                found += [decode.step(tokens_of(step, 2)).clone() for step in range(3, 12)]
            decode.close()
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_cache_that_was_filled_by_hand(wide: Any) -> None:
    """As a benchmark fills one: keys and values of nobody's prompt."""
    heads = (wide.config.text_config.num_key_value_heads, 32)
    plan = PLANS["every-eight"]
    with torch.no_grad(), lightvlm.attach(wide, plan) as run:
        cache = CompactCache(wide.config, plan)
        cache.begin(run, [0, 3])
        with run.reading(cache):
            for index, layer in enumerate(cache.layers):
                cache.update(*torch.randn(2, 2, heads[0], 50, heads[1]), index)
                layer.begin([0, 3], 50, 50, False)
        with DecodeStep(run, cache, ahead=20, capture=record) as decode:
            for step in range(20):
                assert decode.step(tokens_of(step, 2)).isfinite().all()
    assert [layer.seen for layer in cache.layers] == [70] * DEPTH
    assert run.report().compactions == 2


def test_a_used_up_capacity_changes_nothing(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), lightvlm.attach(model, PLANS["none"]) as run:
        cache = CompactCache(model.config, capacity=length + 2)
        model(**inputs, past_key_values=cache)
        with DecodeStep(run, cache) as decode:
            for step in range(2):
                decode.step(tokens_of(step, len(ROWS)))
            before = [layer.bounds()[1].tolist() for layer in cache.layers]
            with pytest.raises(
                ValueError, match=f"capacity of the cache is {length + 2} tokens; this step needs"
            ):
                decode.step(tokens_of(2, len(ROWS)))
            assert [layer.bounds()[1].tolist() for layer in cache.layers] == before
    assert cache.get_seq_length() == length + 2


def test_a_packing_plan_whose_buffer_is_full(wide: Any) -> None:
    """A short prompt is not packed, and a long question fills its buffer to the last place."""
    plan = lightvlm.Plan(precision=lightvlm.KVPrecision())
    inputs = prompt(LLAVA, [[1, 2, 3]])
    with torch.no_grad(), lightvlm.attach(wide, plan) as run:
        out = wide(**inputs)
        cache = out.past_key_values
        free = cache.layers[0].key_storage.shape[1] - cache.layers[0].ends[0]
        extend(LLAVA, wide, inputs["attention_mask"], torch.ones(1, free).long(), past_key_values=cache)
        with DecodeStep(run, cache) as decode:
            for step in range(3):
                assert decode.step(tokens_of(step, 1)).isfinite().all()
    assert cache.get_seq_length() == 3 + free + 3


def test_a_run_that_is_detached_in_the_middle(wide: Any) -> None:
    with torch.no_grad(), lightvlm.attach(wide, PLANS["none"]) as run:
        cache = read_prompt(wide, run, LONG).past_key_values
        with DecodeStep(run, cache) as decode:
            decode.step(tokens_of(0, 2))
            run.detach()
            with pytest.raises(ValueError, match="the run is detached"):
                decode.step(tokens_of(1, 2))
    assert cache.get_seq_length() == LLAVA.batch(LONG)["input_ids"].shape[1] + 1
