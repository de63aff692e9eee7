"""``lightvlm bench ops``: every case is right and its row complete. How fast is nobody's claim here."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightvlm import cli
from lightvlm.bench import cases, compare, floors, goals, gpu_state, jobs, measure, ops, timing
from lightvlm.bench.cases import Case, Sizes
from python.bench_fakes import Clock, FakeDevice, RunningClock

CPU = torch.device("cpu")
FIELDS = {"seconds", "baseline_seconds", "ratio", "microseconds"}


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    return parser.parse_args(options)


def nothing() -> None:
    pass


@pytest.mark.parametrize("name", sorted(cases.CASES))
def test_rows_are_complete(name: str) -> None:
    result = ops.run(arguments("--op", name, "--tokens", "64", "--cache-mib", "1", "--rounds", "2"))
    assert result["kind"] == "ops"
    assert {"device", "torch", "commit", "ceilings"} <= result.keys()
    assert result["rows"]
    assert ops.exit_status(result) == 0
    json.dumps(result, allow_nan=False)
    assert cli.bench.show(result) is None
    for row in result["rows"]:
        assert row["method"] == name
        assert row["baseline"] in row["baselines"]
        assert row["baseline_seconds"] == min(row["baselines"].values())
        for field in FIELDS:
            assert row[field] > 0
            assert math.isfinite(row[field])
        assert set(row["runs"]) >= {name, *row["baselines"]}
        assert all(len(times) == 2 for times in row["runs"].values())
        if row.get("bytes"):
            assert row["gigabytes_per_second"] > 0
        if row.get("bytes") or row.get("flops"):
            assert row["floor_microseconds"] > 0
            assert row["share_of_floor"] > 0
        if name in ("compact_kv_", "gather_tokens"):
            assert row["memcpy"].startswith("memcpy")
            assert row["share_of_memcpy"] > 0
        if name == "compact_kv_":
            assert row["peak_memory_growth"] is None or row["peak_memory_growth"] < 1_000_000


def test_quick_is_the_command_line_s_smoke_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ops", "--quick", "--op", "select", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert all(row.keys() >= FIELDS for row in result["rows"])
    assert result["rows"][0]["parameters"]["tokens"] == 256


def test_a_process_of_its_own_finds_the_same_rows() -> None:
    options = ("--op", "select", "gather_tokens", "--quick")
    here, there = ops.run(arguments(*options)), ops.run(arguments(*options, "--isolate"))
    assert [row["case"] for row in here["rows"]] == [row["case"] for row in there["rows"]]
    assert all(row.keys() >= FIELDS for row in there["rows"])
    assert there["ceilings"]["source"] == here["ceilings"]["source"]


def bench(device: FakeDevice | None = None) -> measure.Bench:
    known = floors.Known("test", 1e9, {torch.float32: 1e9})
    return measure.Bench(CPU, timing.Effort(2), known, device)


def listed(monkeypatch: pytest.MonkeyPatch, *found: Case | Exception) -> jobs.Job:
    """A job whose cases are these; an exception is raised in its place."""

    def cases_of(sizes: Sizes) -> Iterator[Case]:
        for one in found:
            if isinstance(one, Exception):
                raise one
            yield one

    monkeypatch.setitem(cases.CASES, "select", cases_of)
    return jobs.Job("select", Sizes(CPU, tokens=(8,), models=("7b",)))


def run_job(
    job: jobs.Job, *, seen: Any = None, deadline: float = math.inf, device: Any = None
) -> list[jobs.Row]:
    return list(jobs.run_job(job, bench(device), set() if seen is None else seen, deadline))


def wrong() -> None:
    raise AssertionError("the two\n disagree")


def test_a_wrong_result_is_not_timed() -> None:
    with pytest.raises(AssertionError, match="disagree"):
        measure.measure("op", Case("a case", nothing, {"other": nothing}, wrong), bench())


def test_one_case_s_trouble_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Case("good", nothing, {"other": nothing}, nothing)
    bad = Case("bad", nothing, {"other": nothing}, wrong)
    job = listed(monkeypatch, bad, good, RuntimeError("no such thing"))
    first, second, third = run_job(job)
    assert first == {"case": "bad", "method": "select", "error": "AssertionError: the two  disagree"}
    assert second.keys() >= FIELDS
    assert second["parameters"] == {"model": "7b", "tokens": 8, "batch": 1}
    assert third["case"] == "8 tokens, batch 1 (7b)"
    assert third["error"] == "RuntimeError: no such thing"


def test_too_little_memory_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    job = listed(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB"))
    (row,) = run_job(job)
    assert row["skipped"] == "needs more memory than there is"
    (row,) = run_job(listed(monkeypatch, RuntimeError("DefaultCPUAllocator: not enough memory: you tried")))
    assert "skipped" in row


def test_time_that_is_over_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    job = listed(monkeypatch, Case("good", nothing, {"other": nothing}, nothing))
    (row,) = run_job(job, deadline=0.0)
    assert row["skipped"].startswith("the time")
    result = ops.run(arguments("--op", "select", "--quick", "--seconds", "1e-9"))
    assert all("skipped" in row for row in result["rows"])
    assert ops.exit_status(result) == 0
    cli.bench.show(result)


def test_a_case_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases that do not depend on a size come again with the next one."""
    good = Case("good", nothing, {"other": nothing}, nothing)
    seen: set[tuple[str, str]] = set()
    assert len(run_job(listed(monkeypatch, good, good), seen=seen)) == 1
    assert run_job(listed(monkeypatch, good), seen=seen) == []


def test_a_lost_device_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    device = FakeDevice(clock)
    device.lost = True
    job = listed(monkeypatch, *[Case(name, clock.pause(1), {"o": clock.pause(1)}, nothing) for name in "ab"])
    monkeypatch.setattr(timing, "time", clock)
    rows: list[jobs.Row] = []
    with pytest.raises(jobs.DeviceLost, match="capture"):
        rows.extend(jobs.run_job(job, bench(device), set(), math.inf))
    assert [row["case"] for row in rows] == ["a", "a"]  # cold and warm


def test_a_wrong_op_is_bad_news(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    listed(monkeypatch, Case("bad", nothing, {"other": nothing}, wrong))
    assert cli.main(["bench", "ops", "--op", "select", "--quick", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"][0]["error"].startswith("AssertionError")
    assert "select, bad: AssertionError" in said.err


@pytest.mark.parametrize("name", sorted(cases.CASES))
def test_a_run_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the GPU: jobs of one size, both caches and modes, goals, the table, and JSON."""
    known = floors.KNOWN[goals.H200]
    here = measure.Bench(CPU, timing.Effort(2), known, FakeDevice(RunningClock()), goals.H200)
    monkeypatch.setattr(ops.Options, "bench", lambda options: here)
    monkeypatch.setattr(timing, "MOST_EAGER", 1)
    monkeypatch.setattr(timing, "MOST_CAPTURED", 2)
    sizes = Sizes(CPU, tokens=(64, 128), batches=(1,), models=("0.5b",), cache_bytes=1 << 20)
    options = ops.Options("cpu", None, here.effort, timing.CACHES, nvtx=False, deadline=math.inf)
    sent: list[tuple[str, int, Any]] = []
    listed = list(enumerate(jobs.split([name], sizes)))
    assert ops.work(options, set(), listed, lambda *message: sent.append(message)) == len(listed) == 2
    about = {key: value for kind, _, content in sent if kind == "about" for key, value in content.items()}
    rows = [content for kind, _, content in sent if kind == "row"]
    assert set(about["empty_kernel_microseconds"]) == {
        f"{c} {m}" for c in timing.CACHES for m in ("eager", "graph")
    }
    keys = [(row["case"], row["cache"]) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert row.keys() >= FIELDS
        assert (row["mode"], row["capture_failures"]) == ("graph", {})
    result = {"kind": "ops", "device": "d", "torch": "t", "commit": "c", **about, "rows": rows}
    json.dumps(result, allow_nan=False)
    cli.bench.show(result)
    assert {row["verdict"] for row in compare.compare(rows, rows, 0.05)} == {"same"}


def test_jobs_of_a_gpu_begin_with_the_smallest() -> None:
    sizes = Sizes(CPU, tokens=(8192, 2048), batches=(8, 1), models=("7b", "26b"))
    found = jobs.split(["select", "importance"], sizes)
    assert len(found) == 2 * 2 * 2 * 2
    products = [job.sizes.tokens[0] * job.sizes.batches[0] for job in found if job.sizes.tokens]
    assert products == sorted(products)
    assert [job.op for job in found[:2]] == ["select", "importance"]
    assert str(found[0]) == "2048 tokens, batch 1 (7b)"
    assert found[0].parameters() == {"model": "7b", "tokens": 2048, "batch": 1}


def test_defaults_depend_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu, on_cpu, quick = arguments("--device", "cuda"), arguments(), arguments("--quick", "--rounds", "4")
    for args in (on_gpu, on_cpu, quick):
        ops.fill_in(args)
    assert (on_gpu.tokens, on_gpu.batch) == ([2048, 8192, 32768, 131072], [1, 8, 32])
    assert (on_gpu.model, on_gpu.isolate, on_gpu.rounds) == (["7b", "26b"], True, 5)
    assert (on_cpu.tokens, on_cpu.batch, on_cpu.isolate, on_cpu.rounds) == (None, [1], False, 9)
    assert (quick.tokens, quick.model, quick.rounds) == ([256], ["0.5b"], 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--cache-mib", "0"), "--cache-mib must be at least 1, got 0"),
        (("--tokens", "8", "-3"), "--tokens must be at least 1, got -3"),
        (("--batch", "0"), "--batch must be at least 1, got 0"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--seconds", "0"), "--seconds must be above 0, got 0"),
        (("--case-seconds", "-1"), "--case-seconds must be above 0, got -1"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.run(arguments(*options))


def test_gpu_state_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state.gpu_state() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'A GPU, 580.1, P0, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 90 W, 31, 0 MiB, 0x0'\n"
    )
    tool.chmod(0o755)
    found = gpu_state.gpu_state(1)
    assert found is not None
    assert (found["name"], found["driver_version"], found["clocks.sm"]) == ("A GPU", "580.1", "1980 MHz")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_state.gpu_state() is None
