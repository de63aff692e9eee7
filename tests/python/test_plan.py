"""Plans: JSON there and back, and a clear error for everything that is not a plan."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import lightvlm
import pytest
from lightvlm import Plan
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.lightvlm import LightVLMPrefill
from lightvlm.methods.random import RandomPrefill
from lightvlm.plan import register_part

PLANS = [
    Plan(),
    lightvlm.LightVLM(),
    lightvlm.LightVLM(keep=1, decode_keep=None),
    lightvlm.LightVLM(
        keep=0.2,
        layers=(2, 5),
        fractions=(0.5, 0.2),
        probe_rows="last",
        probe_limit=3,
        over_rows="max",
        over_heads="max",
        selection="top",
        strength=0.25,
        merge="score",
        min_image_tokens=0,
        decode_keep=0.5,
        decode_interval=7,
        decode_sinks=0,
        decode_recent=5,
        decode_rows=3,
    ),
    lightvlm.Random(keep=0.1, layers=(0,), merge="uniform", seed=7),
    Plan(cache=DecodeCompaction(keep=0.9)),
    Plan(keep_for_later="quantize"),
    lightvlm.LightVLM(keep_for_later="drop"),
    lightvlm.Random(keep_for_later="quantize"),
]


@pytest.mark.parametrize("plan", PLANS)
def test_json_round_trip(plan: Plan) -> None:
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(plan.to_json(indent=2)) == plan
    assert hash(Plan.from_json(text)) == hash(plan)
    assert json.loads(text)["schema_version"] == 1


def test_json_names_every_option() -> None:
    data = json.loads(lightvlm.LightVLM().to_json())
    assert set(data) == {"schema_version", "prefill", "cache", "precision", "keep_for_later"}
    assert data["prefill"]["kind"] == "lightvlm"
    assert set(data["prefill"]) == {"kind", *(field.name for field in dataclasses.fields(LightVLMPrefill))}
    assert data["cache"]["kind"] == "decode_compaction"
    assert data["precision"] is None


def test_missing_parts_and_options_take_their_defaults() -> None:
    assert Plan.from_json('{"schema_version": 1}') == Plan()
    plan = Plan.from_json('{"schema_version": 1, "prefill": {"kind": "random", "seed": 3}}')
    assert plan == lightvlm.Random(seed=3)
    assert plan.keep_for_later == "offload"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        (
            '{"schema_version": 1, "keep_for_later": "all"}',
            "keep_for_later must be one of 'offload', 'quantize', 'drop', got 'all'",
        ),
        ("{", "not JSON"),
        ("[]", "must be a JSON object, got list"),
        ("null", "must be a JSON object"),
        ("{}", "schema_version None"),
        ('{"schema_version": 2}', "schema_version 2; this version reads 1"),
        ('{"schema_version": "1"}', "schema_version '1'"),
        ('{"schema_version": 1, "decode": null}', "no part 'decode'; parts: prefill, cache, precision"),
        ('{"schema_version": 1, "prefill": 3}', "prefill must be null or an object with a 'kind', got 3"),
        ('{"schema_version": 1, "prefill": {}}', "prefill must be null or an object with a 'kind'"),
        ('{"schema_version": 1, "prefill": {"kind": ["random"]}}', "prefill must be null or an object"),
        ('{"schema_version": 1, "prefill": {"kind": null}}', "prefill must be null or an object"),
        (
            '{"schema_version": 1, "prefill": {"kind": "fast"}}',
            "unknown prefill kind 'fast'; known: ",
        ),
        ('{"schema_version": 1, "cache": {"kind": "lightvlm"}}', "unknown cache kind 'lightvlm'"),
        (
            '{"schema_version": 1, "precision": {"kind": "int4"}}',
            "unknown precision kind 'int4'; known: kv",
        ),
        (
            '{"schema_version": 1, "prefill": {"kind": "random", "keeep": 1}}',
            "prefill kind 'random' has no option 'keeep'; options: fractions, keep",
        ),
        ('{"schema_version": 1, "prefill": {"kind": "random", "keep": 0}}', "keep must be in (0, 1], got 0"),
        (
            '{"schema_version": 1, "prefill": {"kind": "random", "keep": NaN}}',
            "keep must be in (0, 1], got nan",
        ),
        (
            '{"schema_version": 1, "prefill": {"kind": "lightvlm", "merge": "none"}}',
            "merge must be one of 'uniform', 'score', 'drop', got 'none'",
        ),
    ],
)
def test_bad_json_is_a_value_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"keep": "0.5"', "keep must be a number in (0, 1], got '0.5'"),
        ('"keep": true', "keep must be a number"),
        ('"layers": 3', "layers must be tuple, got 3"),
        ('"layers": ["1"]', "layers must hold int only, got ('1',)"),
        ('"layers": [1.5]', "layers must hold int only"),
        ('"layers": [true]', "layers must hold int only"),
        ('"fractions": [null]', "fractions must hold float or int only"),
        ('"seed": 1.5', "seed must be int, got 1.5"),
        ('"merge": 1', "merge must be str, got 1"),
        ('"min_image_tokens": null', "min_image_tokens must be int, got None"),
    ],
)
def test_wrong_types_in_json(text: str, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        Plan.from_json('{"schema_version": 1, "prefill": {"kind": "random", ' + text + "}}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be in (0, 1], got 0"),
        ({"keep": -0.5}, "keep must be in (0, 1], got -0.5"),
        ({"keep": 1.01}, "keep must be in (0, 1], got 1.01"),
        ({"keep": float("nan")}, "keep must be in (0, 1], got nan"),
        ({"probe_rows": "all"}, "probe_rows must be one of 'text', 'last', got 'all'"),
        ({"probe_limit": 0}, "probe_limit must be at least 1, got 0"),
        ({"over_rows": "sum"}, "over_rows must be one of"),
        ({"over_heads": "sum"}, "over_heads must be one of"),
        ({"selection": "best"}, "selection must be one of"),
        ({"strength": -0.1}, "strength must be at least 0.0, got -0.1"),
        ({"strength": 1.5}, "strength must be at most 1.0, got 1.5"),
        ({"strength": float("nan")}, "strength must be at least 0.0, got nan"),
        ({"min_image_tokens": -1}, "min_image_tokens must be at least 0, got -1"),
        ({"decode_keep": 0.0}, "keep must be in (0, 1], got 0.0"),
        ({"decode_interval": 0}, "interval must be at least 1, got 0"),
        ({"decode_sinks": -1}, "sinks must be at least 0, got -1"),
        ({"decode_recent": 0}, "recent must be at least 1, got 0"),
        ({"decode_rows": 0}, "rows must be at least 1, got 0"),
    ],
)
def test_out_of_range_options_of_lightvlm(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lightvlm.LightVLM(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "a"}, "keep must be a number in (0, 1], got 'a'"),
        ({"keep": None}, "keep must be a number"),
        ({"layers": [1, 2]}, "layers must be tuple, got [1, 2]"),
        ({"layers": (1, "2")}, "layers must hold int only, got (1, '2')"),
        ({"probe_limit": 2.0}, "probe_limit must be int, got 2.0"),
        ({"strength": "1"}, "strength must be float or int, got '1'"),
        ({"decode_interval": "8"}, "interval must be int, got '8'"),
        ({"decode_sinks": True}, "sinks must be int, got True"),
        ({"seed": 1}, "seed"),
    ],
)
def test_wrong_types_of_lightvlm(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        lightvlm.LightVLM(**options)


def test_parts_go_into_their_own_slot() -> None:
    with pytest.raises(TypeError, match="prefill must be None or a prefill part, got DecodeCompaction"):
        Plan(prefill=DecodeCompaction())
    with pytest.raises(TypeError, match="cache must be None or a cache part, got RandomPrefill"):
        Plan(cache=RandomPrefill())
    with pytest.raises(TypeError, match="keep_for_later must be str, got None"):
        Plan(keep_for_later=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="precision must be None or a precision part, got int"):
        Plan(precision=4)  # type: ignore[arg-type]


def test_plans_are_frozen() -> None:
    plan = lightvlm.LightVLM()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.cache = None  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.prefill.keep = 0.5  # type: ignore[misc,union-attr]


def test_a_kind_is_registered_once() -> None:
    with pytest.raises(ValueError, match="a prefill part named 'random' is registered already"):
        register_part("prefill", "random")(RandomPrefill)
    with pytest.raises(ValueError, match="slot must be prefill, cache or precision, got 'decode'"):
        register_part("decode", "x")


def test_decode_compaction_of_nothing_is_left_out() -> None:
    assert lightvlm.LightVLM(decode_keep=None).cache is None
    assert lightvlm.LightVLM(decode_keep=1).cache is None
    assert lightvlm.LightVLM(decode_keep=0.5).cache == DecodeCompaction(0.5)
