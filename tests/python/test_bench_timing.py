"""How ``bench ops`` times, and what it sets beside a figure: floors and goals. A fake device stands for the GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightvlm.bench import floors, goals, measure, timing
from lightvlm.bench.cases import Case
from python.bench_fakes import Clock, FakeDevice

CPU = torch.device("cpu")


def nothing() -> None:
    pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What ``timing`` reads."""
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


CEILINGS = floors.Known("test", 1e9, {torch.float32: 1e9, torch.bfloat16: 4e9})


def test_turns_begin_one_further_each_round() -> None:
    order = [name for _, name in timing.in_turns(["a", "b", "c"], 3)]
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_cpu_times_what_calls_take(clock: Clock) -> None:
    calls = {"fast": clock.pause(0.01), "slow": clock.pause(3)}
    times = timing.time_on_cpu(calls, timing.Effort(rounds=4))
    assert times == {"fast": [pytest.approx(1e-5)] * 4, "slow": [pytest.approx(3e-3)] * 4}


def test_cpu_repeats_what_is_too_short(clock: Clock) -> None:
    count = 0

    def short() -> None:
        nonlocal count
        count += 1
        clock.now += 1e-4

    timing.time_on_cpu({"short": short}, timing.Effort(rounds=3))
    assert count == 1 + 20 + 3 * 20  # timing.SHORTEST is 20 calls; the first warm-up round does not know it


@pytest.mark.parametrize(("seconds", "rounds"), [(1e9, 9), (5.0, 5), (0.1, 3)])
def test_a_slow_case_gets_fewer_rounds(seconds: float, rounds: int, clock: Clock) -> None:
    calls = {"a": clock.pause(400), "b": clock.pause(600)}
    times = timing.time_on_cpu(calls, timing.Effort(rounds=9, seconds=seconds))
    assert [len(runs) for runs in times.values()] == [rounds, rounds]
    assert timing.Effort(rounds=2, seconds=seconds).for_calls(1.0) == 2


@pytest.mark.parametrize("cold", [False, True])
def test_cuda_times_eager_and_graph(cold: bool, clock: Clock) -> None:
    device = FakeDevice(clock)
    calls = {"a": clock.pause(0.1), "b": clock.pause(3)}
    runs = timing.time_on_cuda(calls, timing.Effort(3), device, cold=cold)
    wanted = {"a": [pytest.approx(1e-4)] * 3, "b": [pytest.approx(3e-3)] * 3}
    assert runs.eager == wanted
    assert runs.graph == wanted
    assert runs.failures == {}
    assert runs.mode("a") == "graph"
    assert runs.best("a") is runs.graph["a"]
    assert (device.flushes > 0) == cold
    assert set(device.ranges) == {"a eager", "a graph", "b eager", "b graph"}


def test_the_flush_is_not_on_the_account_of_the_call(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(clock)
    monkeypatch.setattr(device, "flush", clock.pause(4))
    runs = timing.time_on_cuda({"a": clock.pause(2)}, timing.Effort(2), device, cold=True)
    assert runs.graph == {"a": [pytest.approx(2e-3)] * 2}
    assert runs.eager == {"a": [pytest.approx(2e-3)] * 2}


def test_what_cannot_be_captured_says_why(clock: Clock) -> None:
    call = clock.pause(1)
    device = FakeDevice(clock, (call,))
    runs = timing.time_on_cuda({"a": call, "b": nothing}, timing.Effort(2), device, cold=False)
    assert runs.failures == {"a": "waits for the device: it reads a tensor"}
    assert (runs.mode("a"), runs.mode("b")) == ("eager", "graph")
    assert runs.best("a") is runs.eager["a"]
    assert len(runs.eager["a"]) == 2


def example(clock: Clock, **options: Any) -> Case:
    return Case(
        "a case", clock.pause(1), {"other": clock.pause(2), "another": clock.pause(4)}, nothing, **options
    )


def test_rows_on_a_gpu(clock: Clock) -> None:
    case = example(clock, bytes=500_000, parameters={"tokens": 8192, "rows": 1})
    device = FakeDevice(clock, (case.baselines["other"],))
    bench = measure.Bench(CPU, timing.Effort(2), CEILINGS, device, goals.H200)
    cold, warm = measure.measure("select", case, bench)
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    for row in (cold, warm):
        assert row["baseline"] == "other"
        assert row["modes"] == {"select": "graph", "other": "eager", "another": "graph"}
        assert row["mode"] == "graph"
        assert row["capture_failures"] == {"other": "waits for the device: it reads a tensor"}
        assert row["graph_microseconds"] == {"select": pytest.approx(1000), "another": pytest.approx(4000)}
        assert set(row["eager_microseconds"]) == {"select", "other", "another"}
        assert row["seconds"] == pytest.approx(1e-3)
        assert row["ratio"] == row["eager_ratio"] == pytest.approx(2)
        assert row["floor_microseconds"] == pytest.approx(500)
        assert row["share_of_floor"] == pytest.approx(0.5)
        assert (row["goal"], row["goal_met"]) == ("<= 6 us", False)
    assert any(name.startswith("select | a case | cold") for name in device.ranges)


def test_rows_on_a_cpu(clock: Clock) -> None:
    case = example(clock, flops=2_000_000, floors={"memcpy": clock.pause(0.5)}, bytes=1000)
    (row,) = measure.measure("op", case, measure.Bench(CPU, timing.Effort(3), CEILINGS))
    assert "cache" not in row
    assert row["ratio"] == pytest.approx(2)
    assert row["floor_by"] == "flops"
    assert row["floor_microseconds"] == pytest.approx(500)  # bfloat16, unless the case says otherwise
    assert row["teraflops"] == pytest.approx(2e-3)
    assert row["memcpy"] == "memcpy"
    assert row["share_of_memcpy"] == pytest.approx(0.5)
    assert "goal" not in row


def test_without_baselines_the_copy_is_what_there_is(clock: Clock) -> None:
    case = Case("a case", clock.pause(1), {}, nothing, floors={"memcpy": clock.pause(1)}, bytes=10)
    (row,) = measure.measure("op", case, measure.Bench(CPU, timing.Effort(2), CEILINGS))
    assert row["baseline"] == "memcpy"


def test_floor_is_the_larger_of_two_times() -> None:
    def floor(**options: Any) -> tuple[float, str]:
        return floors.floor_of(example(Clock(), **options), CEILINGS)

    assert floor() == (0.0, "")
    assert floor(bytes=3) == (pytest.approx(3e-9), "bytes")
    assert floor(bytes=3, flops=8) == (pytest.approx(3e-9), "bytes")
    assert floor(bytes=3, flops=8, precision=torch.float32) == (pytest.approx(8e-9), "flops")
    assert floor(flops=8, precision=torch.int8) == (
        pytest.approx(8e-9),
        "flops",
    )  # as float32, which is known


def test_ceilings_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = floors.ceilings_of(CPU)
    assert found.bytes_per_second(1 << 20) > 1e8
    rate = found.flops_per_second(torch.float32)
    assert rate > 1e8
    monkeypatch.setattr(floors, "_fastest", None)
    assert found.flops_per_second(torch.float32) == rate
    assert found.bytes_per_second(1000) == found.bytes_per_second(
        1 << 20
    )  # of the same size, as 1 MiB is least
    about = floors.describe(found)
    assert about["teraflops"] == {"float32": rate / 1e12}
    assert list(about["gigabytes_per_second"]) == [str(1 << 20)]


def test_known_ceilings_are_described() -> None:
    about = floors.describe(floors.KNOWN["NVIDIA H200"])
    assert about["gigabytes_per_second"] == 4300
    assert about["teraflops"]["bfloat16"] == 600


@pytest.mark.parametrize(
    ("op", "parameters", "limit"),
    [
        ("importance", {"window": 16, "tokens": 8192, "batch": 1}, "<= 5 us"),
        (
            "importance",
            {"window": 128, "lse": "given", "tokens": 8192, "batch": 1, "model": "7b"},
            "<= 23 us",
        ),
        ("importance", {"window": 128, "lse": "own", "tokens": 8192, "batch": 1, "model": "7b"}, None),
        ("importance", {"window": 128, "lse": "given", "tokens": 8192, "batch": 8, "model": "7b"}, None),
        ("importance", {"tokens": 8192, "batch": 1}, None),
        ("decode_attention", {"bits": 4, "tokens": 8192, "batch": 8}, ">= 0.75 share of floor"),
        ("decode_attention", {"bits": 4, "tokens": 8192, "batch": 1}, None),
        ("decode_attention", {"bits": "4/2", "tokens": 131072, "batch": 1}, ">= 0.6 share of floor"),
        ("select", {"rows": "1", "tokens": 8192}, None),
        ("no_such_op", {}, None),
    ],
)
def test_goals_belong_to_cases(op: str, parameters: dict[str, Any], limit: str | None) -> None:
    goal = goals.goal_of(op, goals.H200, parameters)
    assert (goal.text() if goal else None) == limit
    assert goals.goal_of(op, "another device", parameters) is None


def test_goals_are_met_or_missed() -> None:
    few = goals.Goal("op", goals.CPU, "microseconds", 5.0, {})
    many = goals.Goal("op", goals.CPU, "ratio", 2.0, {})
    assert [few.met({"microseconds": found}) for found in (5.0, 5.1)] == [True, False]
    assert [many.met({"ratio": found}) for found in (2.0, 1.9)] == [True, False]
    assert many.met({}) is None


def test_goals_do_not_hide_each_other() -> None:
    """The first that covers a case counts, so no two may cover one."""
    for a, b in itertools.combinations(goals.GOALS, 2):
        if (a.op, a.device) == (b.op, b.device):
            inner = {name: value[0] if isinstance(value, tuple) else value for name, value in b.where.items()}
            assert not a.covers(inner), (a, b)
