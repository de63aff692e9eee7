"""Jobs in a process of their own: what one of them does to its process costs its group and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from lightvlm.bench import isolate

from python import bench_jobs


def run(jobs: Sequence[str], work: Any = bench_jobs.work, **options: Any) -> list[tuple[str, int, Any]]:
    options = {"silence": 60.0, **options}
    return list(isolate.in_processes(work, jobs, group=lambda job: job.split()[0], **options))


def rows(messages: list[tuple[str, int, Any]]) -> list[str]:
    return [content["job"] for kind, _, content in messages if kind == "row"]


def processes(messages: list[tuple[str, int, Any]]) -> int:
    pids = {content["pid"] for kind, _, content in messages if kind == "row"}
    assert os.getpid() not in pids
    return len(pids)


def test_one_process_does_all() -> None:
    found = run(["a 1", "b 1", "a 2"])
    assert rows(found) == ["a 1", "b 1", "a 2"]
    assert processes(found) == 1


def test_a_crash_costs_its_group() -> None:
    found = run(["a 1", "b crash", "a 2", "b 2", "c 1"])
    assert rows(found) == ["a 1", "a 2", "c 1"]
    assert processes(found) == 2
    assert ("problem", 1, "its process ended with exit status 7") in found
    (dropped,) = [(number, text) for kind, number, text in found if kind == "dropped"]
    assert dropped[0] == 3
    assert "exit status 7" in dropped[1]


def test_a_crash_near_the_deadline_is_a_crash() -> None:
    found = run(["a crash", "b 1"], deadline=time.monotonic() + 50)
    assert ("problem", 0, "its process ended with exit status 7") in found
    assert rows(found) == ["b 1"]


def test_a_hang_is_ended() -> None:
    found = run(["a hang", "b 1"], silence=10.0)
    assert rows(found) == ["b 1"]
    assert ("problem", 0, "no answer within 10 s") in found


def test_a_lost_device_gets_a_new_process() -> None:
    found = run(["a 1", "a lost", "a 2"])
    assert rows(found) == ["a 1", "a lost", "a 2"]
    assert processes(found) == 2
    assert all(kind == "row" for kind, _, _ in found)


def test_the_deadline_drops_what_is_left() -> None:
    found = run(["a 1", "b hang", "c 1"], deadline=time.monotonic() + 5)
    assert [(kind, number) for kind, number, _ in found if kind != "row"] == [("dropped", 1), ("dropped", 2)]
    assert all("time" in text for kind, _, text in found if kind == "dropped")


def test_a_process_that_does_not_begin_is_not_tried_again() -> None:
    found = run(["a 1", "b 1"], work=bench_jobs.stillborn)
    assert found == [
        ("problem", 0, "its process ended with exit status 3"),
        ("problem", 1, "its process ended with exit status 3"),
    ]
