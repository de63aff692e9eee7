"""``lightvlm bench decode``: caches are what they claim to be, wrong ones are found, rows are complete."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import pytest
import torch
from lightvlm import cli
from lightvlm.bench import decode, decode_caches, decode_generate, decode_steps, memory
from lightvlm.bench.decode_caches import Candidate, Decoding, States, candidates
from lightvlm.bench.decoder import build_model
from torch import Tensor

TINY = ("--geometry", "tiny", "--threads", "1")
STEP = {
    "seconds", "baseline_seconds", "ratio", "baselines", "bits", "logits_error", "kl", "kv_bytes_allocated",
    "kv_bytes_baseline", "kv_ratio", "kv_bytes_resident", "weight_bytes", "bound_bytes", "bound_seconds",
    "share_of_bound", "in_turns", "runs",
}  # fmt: skip
DYNAMIC, STATIC = "transformers sdpa, dynamic cache", "transformers sdpa, static cache"


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    return parser.parse_args([*TINY, *options])


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("tiny", 2, torch.float32, "cpu")


def states_of(model: Any, batch: int = 2, tokens: int = 400) -> States:
    return States.random(batch, tokens, model.config.text_config, torch.float32, "cpu")


def test_rows_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "decode",
        *TINY,
        "--layers",
        "2",
        "--tokens",
        "400",
        "--batch",
        "2",
        "--rounds",
        "2",
        "--steps",
        "2",
    ]
    assert cli.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"device", "torch", "commit", "ceilings"} <= result.keys()
    steps = {row["method"]: row for row in result["rows"] if row["method"] != "decode_attention"}
    assert list(steps) == [one.name for one in candidates(["16", "8", "4", "4/2"])]
    for name, row in steps.items():
        assert row.keys() >= STEP, name
        assert row["baseline"] in row["baselines"]
        assert set(row["baselines"]) == {DYNAMIC, STATIC}
        assert row["baseline_seconds"] == min(row["baselines"].values())
        assert len(row["runs"]) == 2
        assert all(
            math.isfinite(row[field]) and row[field] > 0 for field in ("seconds", "ratio", "bound_seconds")
        )
        assert ("packing_seconds" in row) == (row["bits"] != "16")
        assert row["decoded_tokens"] == 1 + 3 * 2  # the one that is checked, and three rounds of two
    packed = [steps[f"lightvlm, {bits} bits"] for bits in ("8", "4", "4/2")]
    assert [row["kv_ratio"] for row in packed] == sorted(row["kv_ratio"] for row in packed)
    assert [row["kl"] for row in packed] == sorted(row["kl"] for row in packed)
    assert (
        steps[DYNAMIC]["kv_bytes_allocated"] == 2 * 2 * 2 * 400 * 2 * 32 * 2
    )  # layers, K and V, rows ... bytes
    assert steps[DYNAMIC]["bound_bytes"] - steps[DYNAMIC]["weight_bytes"] == 2 * 2 * 2 * 401 * 2 * 32 * 2
    attention = [
        row for row in result["rows"] if row["method"] == "decode_attention" and "pages" not in row["case"]
    ]
    assert [row["parameters"]["bits"] for row in attention] == ["16", "8", "4", "4/2"]
    assert all("SDPA as transformers calls it" in row["baselines"] for row in attention)
    decode.table(result)


@pytest.mark.parametrize("one", candidates(["16", "8", "4", "4/2"])[1:], ids=lambda one: one.name)
def test_a_synthesised_cache_is_read_like_the_dynamic_one(model: Any, one: Candidate) -> None:
    """Its first steps have the dynamic cache's logits, up to what the bits cost, and more bits cost less."""
    states = states_of(model)
    with torch.inference_mode():
        wanted, found = Decoding(Candidate("dynamic"), model, states, 8), Decoding(one, model, states, 8)
        for _ in range(3):
            with found.ready():
                logits = found.step()
            error = decode_caches.check(found, logits, wanted.step(), states)
            assert error <= {"16": 1e-5, "8": 0.02, "4": 0.3, "4/2": 0.6}[one.bits]
    if one.kind == "compact" and one.bits != "16":
        assert found.cache.get_seq_length() == 403
        assert {one.packed.bits for one in found.cache.layers[0].packed.prompt} == set(
            map(int, one.bits.split("/"))
        )
    assert not any(hasattr(layer.self_attn, "_lightvlm_run") for layer in model.model.language_model.layers)


def test_the_dynamic_cache_is_what_a_prompt_leaves(model: Any) -> None:
    """A cache filled with the keys and values that a prompt leaves goes on as the prompt's own does."""
    ids = torch.randint(8, 1000, (2, 300))
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=True).past_key_values
        decoding = Decoding(Candidate("dynamic"), model, states_of(model, tokens=300), 8)
        for mine, theirs in zip(decoding.cache.layers, own.layers, strict=True):
            mine.keys, mine.values = theirs.keys, theirs.values
        longer = torch.cat([ids, torch.full((2, 1), 7)], dim=1)
        wanted = model(input_ids=longer).logits[:, -1]
        assert (decoding.step() - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_wrong_cache_is_found(model: Any) -> None:
    """Keys and logits that are somebody else's, and attention that is over other segments than it should be."""
    states = states_of(model)
    with torch.inference_mode():
        decoding = Decoding(Candidate("compact", "8"), model, states, 8)
        with decoding.ready():
            logits = decoding.step()
        others = States(states.key.flip(2), states.value)
        with pytest.raises(AssertionError, match=r"keys in 8 bits are off by 1\.4, more than 0\.02"):
            decode_caches.check(decoding, logits, logits, others)
        with pytest.raises(AssertionError, match="logits are off by"):
            decode_caches.check(decoding, logits, torch.randn_like(logits) * logits.std(), states)
        full = decode_caches.exactly

        def over_less(query: Tensor, segments: Any, rows: Any) -> Tensor:
            return full(query, segments[:-2] + segments[-1:], rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_caches, "exactly", over_less)
            with pytest.raises(AssertionError, match="attention over a packed layer is off by"):
                decode_caches.check(decoding, logits, logits, states)


def test_a_wrong_candidate_is_bad_news(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode_steps, "check", lambda *args: decode_caches.require(False, "all wrong"))
    words = ["--layers", "1", "--tokens", "300", "--batch", "1", "--rounds", "1", "--no-attention", "--json"]
    assert cli.main(["bench", "decode", *TINY, *words]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"][0]["error"] == "AssertionError: all wrong"
    assert "all wrong" in said.err


def test_one_after_the_other_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "--layers",
        "2",
        "--tokens",
        "400",
        "--batch",
        "1",
        "--rounds",
        "1",
        "--bits",
        "4",
        "--no-attention",
    ]
    dense = 2 * 2 * 400 * 2 * 32 * 2
    room = {"together": 20 * dense, "alone": 4 * dense, "no packing": 3.7 * dense, "nothing": dense}
    found = {}
    for name, free in room.items():
        monkeypatch.setattr(decode_steps, "available", lambda device, free=free: free)
        found[name] = decode.run(arguments(*options))["rows"]
    assert [row["in_turns"] for row in found["together"]] == [True] * 3
    assert [row["in_turns"] for row in found["alone"]] == [False] * 3
    assert ["skipped" in row for row in found["no packing"]] == [False, False, True]
    assert [row["skipped"] for row in found["nothing"]] == ["needs more memory than there is"]


def test_slow_steps_are_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "_SLOW", 0.0)
    options = [
        "--tokens",
        "300",
        "--batch",
        "1",
        "--rounds",
        "6",
        "--bits",
        "8",
        "--no-attention",
        "--layers",
        "1",
    ]
    rows = decode.run(arguments(*options, "--case-seconds", "1e-6"))["rows"]
    assert [row["decoded_tokens"] for row in rows] == [1 + 3] * 3
    assert [len(row["runs"]) for row in rows] == [3] * 3


def test_packing_of_generated_tokens_is_timed_where_it_happens(model: Any) -> None:
    with torch.inference_mode():
        decoding = Decoding(Candidate("compact", "4/2"), model, states_of(model), 8)
        for _ in range(2):
            with decoding.ready():
                decoding.step()
                decoding.make_ready_to_pack()
                before = decoding.cache.layers[0].packed.counts[0]
                decoding.pack()
            assert decoding.cache.layers[0].packed.counts[0] == before + 128


def test_storage_bytes() -> None:
    big = torch.zeros(1000)
    view = big[10:20]
    assert memory.storage_bytes([view, big, {"a": (view, torch.zeros(3, dtype=torch.int8))}, "text"]) == 4003
    cycle: list[Any] = [big]
    cycle.append(cycle)
    assert memory.storage_bytes(cycle) == 4000
    assert memory.storage_bytes(None) == 0


def test_peaks_of_memory() -> None:
    device = torch.device("cpu")
    try:
        memory.reset_peak(device)
    except OSError:
        pytest.skip("this system does not let a process reset its peak")
    before = memory.in_use(device)
    assert before is not None
    held = torch.ones(64 << 20, dtype=torch.uint8)
    most = memory.peak(device)
    now = memory.in_use(device)
    assert most is not None
    assert now is not None
    assert most - before >= held.nbytes * 0.9
    assert now - before >= held.nbytes * 0.9
    assert memory.available(device) > 0


def generated(*options: str) -> list[dict[str, Any]]:
    words = ["--layers", "1", "--batch", "2", "--prompt-tokens", "100", "--kl-tokens", "70", *options]
    rows: list[dict[str, Any]] = decode.run(arguments(*words))["rows"]
    return rows


def test_whole_answers() -> None:
    result = {
        "kind": "decode",
        "device": "d",
        "torch": "t",
        "commit": "c",
        "rows": generated("--generate", "90", "--no-isolate"),
    }
    dynamic, static, ours = result["rows"]
    assert [row["method"] for row in result["rows"]] == [DYNAMIC, STATIC, "lightvlm, compaction"]
    full = 2 * 2 * 189 * 2 * 32 * 2  # K and V, rows, tokens, heads, channels, bytes
    assert dynamic["kv_bytes_used"] == static["kv_bytes_used"] == dynamic["kv_bytes_allocated"] == full
    assert ours["compactions"] == 1
    assert ours["kv_bytes_used"] < full
    assert ours["baseline"] in (DYNAMIC, STATIC)
    assert ours["baseline_seconds"] == min(dynamic["seconds"], static["seconds"])
    assert ours["kl"]["tokens"] == 2 * 70
    assert ours["kl"]["mean"] > 0
    for row in result["rows"]:
        assert 0 < row["prefill_seconds"] < row["seconds"]
        assert row["kv_ratio"] > 0
    json.dumps(result, allow_nan=False)
    cli.bench.show(result)


def test_each_answer_in_a_process_of_its_own() -> None:
    settings = decode_generate.Settings("tiny", 1, 1024, "float32", "cpu", 1, 20, 4, 0, 0.35)
    found = decode_generate._in_processes(settings, [decode_generate.Answer(1, "dynamic")])
    assert found[0]["kv_bytes_used"] == 2 * 23 * 2 * 32 * 4


def test_an_answer_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Any, job: decode_generate.Answer) -> dict[str, Any]:
        if job.cache == "static":
            raise RuntimeError("no\nluck")
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode_generate, "_measured", fail)
    rows = generated("--generate", "5", "--no-isolate")
    assert [row.get("error") for row in rows] == [None, "RuntimeError: no luck", None]
    assert rows[0]["skipped"] == rows[2]["skipped"] == "needs more memory than there is"
    assert rows[0]["method"] == DYNAMIC


def test_time_that_is_over_is_a_reason() -> None:
    rows = decode.run(arguments("--tokens", "300", "--batch", "2", "1", "--seconds", "1e-9"))["rows"]
    assert rows
    assert {row["skipped"] for row in rows} == {"the time for the whole run was over"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--case-seconds", "0"), r"--case-seconds must be above 0, got 0\.0"),
        (("--seconds", "0"), r"--seconds must be above 0, got 0\.0"),
        (("--tokens", "512", "100"), "--tokens must be at least 256, got 100"),
        (("--batch", "0"), "--batch must be at least 1, got 0"),
        (("--layers", "0"), "--layers must be at least 1, got 0"),
        (("--vocabulary", "8"), "--vocabulary must be at least 16, got 8"),
        (
            ("--rounds", "30"),
            "--rounds . 1 times --steps must be at most 95, before tokens are packed, got 124",
        ),
        (("--generate", "1"), "--generate must be at least 2, got 1"),
        (("--generate", "8", "--prompt-tokens", "0"), "--prompt-tokens must be at least 1, got 0"),
        (("--generate", "8", "--decode-keep", "1"), "--decode-keep must be between 0 and 1, got 1"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode.run(arguments(*options))
