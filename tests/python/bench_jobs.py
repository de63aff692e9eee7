"""Jobs that go wrong in a process of their own, which imports this module and little else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any


def work(jobs: list[tuple[int, str]], send: Callable[[str, int, Any], None]) -> None:
    """For `isolate`: a job is a word, and does what it says."""
    for number, job in jobs:
        send("begin", number, None)
        word = job.split()[-1]
        if word == "crash":
            os._exit(7)
        if word == "hang":
            time.sleep(600)
        send("row", number, {"pid": os.getpid(), "job": job})
        if word == "lost":
            send("restart", number, None)
            return
        send("end", number, None)


def stillborn(jobs: list[tuple[int, str]], send: Callable[[str, int, Any], None]) -> None:
    """Ends before its first job."""
    os._exit(3)
