"""``lightvlm bench ops``: every case is right and its row complete. How fast is nobody's claim here."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch
from lightvlm.bench import cases, ops


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    return parser.parse_args(options)


@pytest.mark.parametrize("name", sorted(cases.CASES))
def test_rows_are_complete(name: str) -> None:
    result = ops.run(arguments("--op", name, "--tokens", "64", "--cache-mib", "1", "--rounds", "2"))
    assert result["kind"] == "ops"
    assert {"device", "torch", "commit"} <= result.keys()
    assert result["rows"]
    json.dumps(result, allow_nan=False)
    for row in result["rows"]:
        assert row["method"] == name
        assert row["baseline"] in row["baselines"]
        assert row["baseline_seconds"] == min(row["baselines"].values())
        for field in ("seconds", "baseline_seconds", "ratio"):
            assert row[field] > 0
            assert math.isfinite(row[field])
        assert set(row["runs"]) >= {name, *row["baselines"]}
        assert all(len(times) == 2 for times in row["runs"].values())
        if name in ("compact_kv_", "gather_tokens"):
            assert row["bytes"] > 0
            assert row["memcpy"].startswith("memcpy")
            assert row["share_of_memcpy"] > 0
            assert row["gigabytes_per_second"] > 0
        if name == "compact_kv_":
            assert row["peak_memory_growth"] is None or row["peak_memory_growth"] < 1_000_000


def test_a_wrong_result_is_not_timed() -> None:
    def wrong() -> None:
        raise AssertionError("disagrees")

    case = cases.Case("a case", lambda: None, {"other": lambda: None}, wrong)
    with pytest.raises(AssertionError, match="disagrees"):
        ops.measure("op", case, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--cache-mib", "0"), "--cache-mib must be at least 1, got 0"),
        (("--tokens", "8", "-3"), "--tokens must be at least 1, got -3"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.run(arguments(*options))
