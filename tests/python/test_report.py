"""What a run reports: counts, FLOPs, bytes, calls, JSON and text."""

from __future__ import annotations

import json
import math
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import Report
from lightvlm.methods.prumerge import PruMergePrefill
from python.test_prefill import ROWS, lightvlm_plan
from python.tiny import DEPTH, LLAVA, QWEN, Family, Image, generate

TEXT = [5, 3, 12, 2]
IMAGES: list[list[int]] = [[16], [], [16, 16], [16]]


def kept(share: float) -> list[int]:
    """Tokens of each row of ROWS with that share of every image."""
    return [
        t + sum(max(1, math.floor(share * n + 0.5)) for n in sizes)
        for t, sizes in zip(TEXT, IMAGES, strict=True)
    ]


def flops(model: Any, tokens: list[list[int]]) -> int:
    """FLOPs of the decoder's layers over tokens[layer][row], from the sizes in the configuration."""
    config = model.config.text_config
    width, inner = config.hidden_size, config.intermediate_size
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head = width // heads
    total = 0
    for counts in tokens:
        for n in counts:
            total += 2 * n * width * head * (heads + 2 * groups)  # queries, keys, values
            total += 2 * n * heads * head * width  # what attention gives back
            total += 2 * n * 3 * width * inner  # the gated MLP
            total += (
                2 * 2 * heads * head * sum(range(1, n + 1))
            )  # scores and weighted values of visible pairs
    return total


def test_tokens_and_flops(model: Any, family: Family) -> None:
    fractions = (0.6, 0.2)
    with lightvlm.attach(model, lightvlm_plan(keep=0.2, layers=(2, 3), fractions=fractions)) as run:
        generate(model, family.batch(ROWS), 3)
    report = run.report()
    layers = [kept(1), kept(1), kept(0.6), kept(0.2), kept(0.2)]
    assert report.prefills == 4
    assert report.tokens_per_layer == [sum(counts) / 4 for counts in layers]
    assert report.image_tokens == 64 / 3  # a row without an image has no part in it
    assert report.image_tokens_kept == [(sum(counts) - sum(TEXT)) / 3 for counts in layers]
    assert report.image_keep_share == pytest.approx(
        sum(report.image_tokens_kept) / DEPTH / report.image_tokens
    )
    assert report.flops_share == pytest.approx(flops(model, layers) / flops(model, [kept(1)] * DEPTH))
    assert report.stepped_aside == {}
    assert report.errors == []


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.35, 0.5, 0.97])
def test_counts_are_the_stated_ones(qwen: Any, keep: float) -> None:
    sizes = [(1, 1), (1, 2), (3, 5), (4, 8)]
    row = [token for number, size in enumerate(sizes) for token in (1, Image(number, *size))]
    with lightvlm.attach(qwen, lightvlm_plan(keep=keep, layers=(1,)), trace=True) as run:
        generate(qwen, QWEN.batch([[*row, 5]]), 2)
    expected = [max(1, math.floor(keep * h * w + 0.5)) for h, w in sizes]
    assert [len(image) for image in run.kept[1][0]] == expected
    assert run.report().image_tokens_kept[-1] == sum(expected)


def test_several_prompts_are_averaged(llava: Any) -> None:
    with lightvlm.attach(llava, lightvlm_plan(layers=(1,))) as run:
        for row in ROWS:
            generate(llava, LLAVA.batch([row]), 2)
    assert run.report().tokens_per_layer == [sum(kept(1)) / 4] + [sum(kept(0.3)) / 4] * (DEPTH - 1)


def test_calls(model: Any, family: Family) -> None:
    plan = lightvlm.LightVLM(
        keep=0.3, min_image_tokens=0, decode_keep=0.1, decode_interval=3, decode_recent=5
    )
    with lightvlm.attach(model, plan) as run:
        generate(model, family.batch(ROWS), 8)
        # outside the model nothing is counted
        from lightvlm_ext import ops

        ops.select(torch.rand(1, 4), keep=2)
        with torch.no_grad():
            model.lm_head(torch.zeros(1, 32))
    report = run.report()
    stages = 3  # layers 2, 3 and 4 of five, besides the one before layer 0
    assert report.compactions == report.op_calls["compact_kv_"] == 2
    # heads of 8 channels are too narrow for decode_attention, which would add the mass up by itself
    assert report.op_calls["importance"] == stages + 7 * DEPTH
    assert report.op_calls["select_diverse"] == stages
    assert report.op_calls["merge_tokens"] == stages + 1
    assert report.op_calls["select"] == 2 * DEPTH + 1
    assert set(report.op_seconds) == set(report.op_calls)  # on a CPU
    assert all(seconds > 0 for seconds in report.op_seconds.values())
    assert set(report.seconds) == {"prefill", "decode"}
    assert sum(report.op_seconds.values()) < sum(report.seconds.values())


def test_a_run_that_did_nothing(llava: Any) -> None:
    with lightvlm.attach(llava, lightvlm.LightVLM()) as run:
        pass
    report = run.report()
    assert (report.prefills, report.flops_share, report.image_keep_share) == (0, 1.0, 1.0)
    assert report.tokens_per_layer == [0.0] * DEPTH
    assert "prompts" in str(report)


def test_reports_are_snapshots(llava: Any) -> None:
    with lightvlm.attach(llava, lightvlm_plan()) as run:
        generate(llava, LLAVA.batch(ROWS), 2)
        first = run.report()
        before = first.to_json()
        generate(llava, LLAVA.batch(ROWS), 2)
    assert first.to_json() == before
    assert run.report().prefills == 8
    assert run.report().to_json() == run.report().to_json()


def test_json_and_text(model: Any, family: Family) -> None:
    plan = lightvlm.LightVLM(
        keep=0.3, min_image_tokens=0, decode_keep=0.1, decode_interval=3, decode_recent=5
    )
    with lightvlm.attach(model, plan) as run:
        generate(model, family.batch(ROWS), 8)
        generate(model, family.batch(ROWS[:1], left=False) | {"attention_mask": _with_a_hole(family)}, 2)
    report = run.report()
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert Report(**data) == report
    assert json.loads(report.to_json(indent=1)) == data
    text = str(report)
    for part in (
        "prompts",
        "tokens per layer",
        "KV cache",
        "if nothing were removed",
        "stepped aside",
        "compact_kv_",
    ):
        assert part in text
    assert "the attention mask is not left padding" in text
    assert len({line[: line.index("  ")] for line in text.splitlines()}) == len(text.splitlines())


def _with_a_hole(family: Family) -> torch.Tensor:
    mask = family.batch(ROWS[:1])["attention_mask"]
    mask[0, 1] = 0
    return mask


def test_text_of_a_report() -> None:
    report = Report(
        prefills=2,
        tokens_per_layer=[100.0, 100.0, 40.5],
        image_tokens_kept=[90.0, 90.0, 30.5],
        image_keep_share=0.78,
        flops_share=0.8,
        kv_bytes_used=1000,
        kv_bytes_allocated=2048,
        kv_bytes_full=5 * 1024**3,
        errors=["cuda:0: select: an id"],
    )
    text = str(report)
    assert "100 x2, 40.5" in text
    assert "1000 B used, 2.0 KiB allocated, 5.0 GiB if nothing were removed" in text
    assert "80.0% of the full model's" in text
    assert "error" in text.splitlines()[-1]


def test_device_errors_are_kept(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them clears them, so a report remembers what the ones before it found."""
    from lightvlm import runtime

    found = [["cuda:0: select: first"], [], ["cuda:0: select: second"]]
    monkeypatch.setattr(runtime, "device_errors", lambda: found.pop(0) if found else [])
    with lightvlm.attach(llava, lightvlm_plan()) as run:
        assert run.report().errors == ["cuda:0: select: first"]
        assert run.report().errors == ["cuda:0: select: first"]
    assert run.report().errors == ["cuda:0: select: first", "cuda:0: select: second"]
    assert "cuda:0: select: second" in str(run.report())


class _Event:
    """Stands in for torch.cuda.Event: a clock that ticks at every record and is read once it was waited for."""

    ticks = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: int | None = None
        self.waited = False

    def record(self, stream: str) -> None:
        assert stream == "stream"
        _Event.ticks += 1
        self.at = _Event.ticks

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: _Event) -> float:
        assert end.waited
        assert self.at is not None
        assert end.at is not None
        return 1000.0 * (end.at - self.at)


def test_times_of_a_gpu_are_asked_for_last(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightvlm import statistics

    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(statistics, "_PENDING", 4)
    timers = [statistics.Timer(torch.device("cuda", 0)) for _ in range(9)]
    with lightvlm.attach(llava, lightvlm.Plan()) as run:
        for timer in timers:
            run._stats.add_time("decode", timer.stop())
        assert len(run._stats._times) <= 4
    # timers start at ticks 1 to 9 and stop at 10 to 18: each takes 9 seconds
    assert run.report().seconds == {"decode": 81.0}
    assert run.report().seconds == {"decode": 81.0}


def test_own_work_is_part_of_the_prefill(llava: Any) -> None:
    """What the method does besides the model is timed once, ops within it and outside of it alike."""
    with lightvlm.attach(llava, lightvlm_plan(keep=0.2, layers=(2, 3))) as run:
        generate(llava, LLAVA.batch(ROWS), 3)
    report = run.report()
    assert set(report.seconds) == {"prefill", "decode"}
    assert sum(report.op_seconds.values()) < report.own_seconds < report.seconds["prefill"]
    assert "the method's own work at prefill" in str(report)
    with lightvlm.attach(llava, lightvlm.Plan()) as run:
        generate(llava, LLAVA.batch(ROWS), 3)
    assert run.report().own_seconds == 0.0


def test_reading_the_vision_tower_is_own_work(llava: Any) -> None:
    """Also where the tower runs before the base model is called."""
    plan = lightvlm.Plan(prefill=PruMergePrefill(keep=0.5, min_image_tokens=0))
    with lightvlm.attach(llava, plan) as run:
        llava.get_image_features(pixel_values=LLAVA.batch(ROWS)["pixel_values"])
    report = run.report()
    assert report.prefills == 0
    assert report.own_seconds > 0
