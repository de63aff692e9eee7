"""``lightvlm bench sparse``: inputs need the share that was asked for, wrong attention is found, rows are complete."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import pytest
import torch
from lightvlm import cli, flops
from lightvlm.bench import decoder, floors, sparse, sparse_inputs, sparse_layers, timing
from lightvlm.bench.decoder import build_model
from lightvlm.bench.measure import Bench
from lightvlm.bench.sparse_inputs import GivenShare, inputs_with, share_of
from lightvlm.methods.base import AttentionScores
from lightvlm.methods.zipvl import ZipVLPrefill
from lightvlm.models import find_adapter
from python.bench_fakes import FakeDevice, RunningClock

CPU = torch.device("cpu")
LAYER = {
    "seconds", "baseline_seconds", "ratio", "tau", "attending_share", "flops_reduction", "probe_flops_share",
    "attention_seconds", "overhead_seconds", "ceiling", "ceiling_with_overhead", "attention_share_of_decoder",
    "decoder_ratio", "decoder_ceiling", "runs",
}  # fmt: skip


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sparse.add_arguments(parser)
    return parser.parse_args(["--geometry", "tiny", "--threads", "1", *options])


def test_rows_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--geometry",
        "tiny",
        "--threads",
        "1",
        "--tokens",
        "1024",
        "--rounds",
        "1",
        "--share",
        "0.5",
        "0.25",
    ]
    assert cli.main(["bench", "sparse", *words, "--decoder", "--layers", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"device", "torch", "commit", "ceilings"} <= result.keys()
    layers = [row for row in result["rows"] if row["method"] == "zipvl attention"]
    decoders = [row for row in result["rows"] if row["method"] == "zipvl"]
    assert (len(layers), len(decoders)) == (2, 2)
    for row, share in zip(layers, (0.5, 0.25), strict=True):
        assert row.keys() >= LAYER
        assert row["attending_share"] == pytest.approx(share, abs=0.02)
        assert row["flops_reduction"] == pytest.approx(1 - row["attending_share"] ** 2)
        assert row["probe_flops_share"] == pytest.approx(
            128 / 1025
        )  # one product of the probe rows, over two of half of all pairs
        assert row["ceiling"] == pytest.approx(1 / (row["attending_share"] ** 2 + 128 / 1025))
        assert row["decoder_ceiling"] > 1
        assert all(math.isfinite(row[field]) for field in LAYER - {"runs"})
    for row, share in zip(decoders, (0.5, 0.25), strict=True):
        # the first of the two layers attends in full
        assert row["attending_share"] == pytest.approx((1 + share) / 2, abs=0.01)
        assert row["flops_reduction"] == pytest.approx((1 - share**2) / 2, abs=0.01)
        assert row["stepped_aside"] == {}
    assert cli.bench.show(result) is None


@pytest.mark.parametrize("share", [0.2, 0.6, 0.85])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_need_the_share_that_was_asked_for(share: float, dtype: torch.dtype) -> None:
    found = inputs_with(share, 0.975, 2, 1500, decoder.geometry_of("tiny"), dtype, CPU)
    out = found.attend()
    assert out.shape == (2, 1500, 4, 32)
    assert share_of(found.chosen()) == pytest.approx(share, abs=0.02)
    sparse_layers.verify(found)


def test_a_given_share_is_the_method_s_but_for_the_count() -> None:
    """Where ZipVL's own count is given, the tokens are the same."""
    scores = torch.rand(2, 300) ** 4
    visible = torch.arange(300, 0, -1).expand(2, -1).int()
    valid = torch.ones(2, 300, dtype=torch.bool)
    forced = torch.arange(300).expand(2, -1) >= 299
    given = AttentionScores(scores, visible, valid, forced)
    own = ZipVLPrefill(tau=0.8).choose(given)
    for row in range(2):
        count = int(own.count[row]) - int((own.index[row] == 299).any())
        for one in (count, count + 1):  # the last token may be among the chosen or besides
            found = GivenShare(share=(one + 0.5) / 300).choose(given)
            if int(found.count[row]) == int(own.count[row]):
                assert torch.equal(found.index[row], own.index[row])
                break
        else:
            pytest.fail("no count gives the method's tokens")


def test_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inputs_with(0.4, 0.975, 1, 600, decoder.geometry_of("tiny"), torch.float32, CPU)
    right = found.attend()
    for change, message in (
        (right.roll(1, dims=1), "attention of chosen tokens is off by"),
        (right + 1e-7 * (right == 0), "a token that was not chosen has an output"),
    ):
        monkeypatch.setattr(sparse_inputs.Inputs, "attend", lambda self, change=change: change)
        with pytest.raises(AssertionError, match=message):
            sparse_layers.verify(found)


def test_a_wrong_one_is_bad_news(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(inputs: Any) -> None:
        raise AssertionError("all\nwrong")

    monkeypatch.setattr(sparse_layers, "verify", wrong)
    words = ["--geometry", "tiny", "--tokens", "512", "--rounds", "1", "--share", "0.5", "--json"]
    assert cli.main(["bench", "sparse", *words]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"][0]["error"] == "AssertionError: all wrong"
    assert "all wrong" in said.err


def test_a_layer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the GPU."""
    monkeypatch.setattr(timing, "MOST_EAGER", 1)
    monkeypatch.setattr(timing, "MOST_CAPTURED", 2)
    known = floors.Known("test", 1e9, {torch.float32: 1e9})
    bench = Bench(CPU, timing.Effort(1), known, FakeDevice(RunningClock()), caches=("warm",))
    found = inputs_with(0.4, 0.975, 1, 600, decoder.geometry_of("tiny"), torch.float32, CPU)
    (row,) = sparse_layers._layer(arguments(), bench, "a case", found)
    assert row.keys() >= LAYER
    assert (row["mode"], row["cache"]) == ("graph", "warm")


def test_share_of_attention_is_that_of_the_model() -> None:
    adapter = find_adapter(build_model("tiny", None, torch.float32, "cpu"))
    whole = flops.prefill_flops(adapter, [[700]] * 4)
    linear = 2 * 700 * sum(flops.linear_weights(layer) for layer in adapter.layers)
    assert sparse_layers.attention_share("tiny", 700) == pytest.approx(1 - linear / whole)


def test_amdahl() -> None:
    assert sparse_layers.amdahl(1.0, 4.0) == 4.0
    assert sparse_layers.amdahl(0.5, 2.0) == pytest.approx(4 / 3)
    assert sparse_layers.amdahl(0.0, 9.0) == 1.0


def test_time_that_is_over_is_a_reason() -> None:
    rows = sparse.run(
        arguments("--tokens", "512", "--share", "0.5", "--decoder", "--layers", "1", "--seconds", "1e-9")
    )["rows"]
    assert rows
    assert {row["skipped"] for row in rows} == {"the time for the whole run was over"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--seconds", "0"), r"--seconds must be above 0, got 0\.0"),
        (("--layers", "0"), "--layers must be at least 1, got 0"),
        (("--tokens", "100"), "--tokens must be at least 512, got 100"),
        (("--share", "0.5", "1"), r"--share must be between 0 and 1, got 1\.0"),
        (("--tau", "0"), r"--tau must be between 0 and 1, got 0\.0"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.run(arguments(*options))
