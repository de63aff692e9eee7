"""``lightvlm bench attention``: rows are complete, wrong attention is found, options are checked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightvlm import cli, flash_attn_interface
from lightvlm.bench import attention, goals

WORDS = [
    "bench",
    "attention",
    "--model",
    "0.5b",
    "--tokens",
    "64",
    "--rounds",
    "1",
    "--threads",
    "1",
    "--dtype",
    "float32",
]


@pytest.fixture(autouse=True)
def _few_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of them does, where no time is looked at."""
    monkeypatch.setattr(attention, "IN_TURN", 1 << 20)


def test_rows_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "bfloat16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "attention"
    assert {"device", "torch", "commit", "ceilings"} <= result.keys()
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        assert row.keys() >= {
            "case",
            "baseline",
            "seconds",
            "baseline_seconds",
            "ratio",
            "floor_microseconds",
            "backend",
        }
        assert row["seconds"] > 0
        steps = row["method"].startswith("flash_attn_with_kvcache")
        assert row["backend"] == ("decode" if steps else "cpu_flash")
    decoding = [row for row in result["rows"] if row["method"] == "flash_attn_with_kvcache"]
    assert all(len(row["baselines"]) == 3 for row in decoding)
    in_turn = [row for row in result["rows"] if row["method"] == "flash_attn_with_kvcache_in_turn"]
    assert [row["parameters"]["caches"] for row in in_turn] == [16, 32]
    assert [row["bytes"] for row in in_turn] == [1 << 20, 1 << 20]


def test_shown_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "--case", "importance_window"]) == 0
    shown = capsys.readouterr().out
    assert "attention on" in shown
    assert "without" in shown


@pytest.mark.parametrize("name", sorted(attention.CASES))
def test_wrong_attention_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function = "flash_attn_with_kvcache" if name.startswith("flash_attn_with_kvcache") else "flash_attn_func"
    right = getattr(flash_attn_interface, function)

    def wrong(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        return found * 1.1 if isinstance(found, torch.Tensor) else (found[0], found[1] * 1.1)

    monkeypatch.setattr(flash_attn_interface, function, wrong)
    assert cli.main([*WORDS, "--case", name]) == 1
    assert "not close" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "8"], "--tokens must be at least 32, got 8"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
    ],
)
def test_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, *words]) != 0
    assert message in capsys.readouterr().err


def test_what_is_left_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "--seconds", "1e-9", "--json"]) == 0
    assert all("skipped" in row for row in json.loads(capsys.readouterr().out)["rows"])


def test_goals() -> None:
    """Each case has one at the size that it is about."""
    for name, tokens in (
        ("flash_attn_func", 1024),
        ("importance_window", 8192),
        ("flash_attn_with_kvcache", 8192),
        ("flash_attn_with_kvcache_in_turn", 8192),
    ):
        assert name in attention.CASES
        assert goals.goal_of(name, goals.CPU, {"tokens": tokens, "batch": 1, "dtype": "bfloat16"}) is not None
