"""Jobs in a process of their own, so that one that crashes or hangs costs its op and not the run."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

Job = Any
Send = Callable[[str, int, Any], None]
Work = Callable[[list[tuple[int, Job]], Send], object]
"""Works through numbered jobs in a child. It sends ("begin", number, None), any number of ("row", number, row), then
("end", number, None) for each of them; ("restart", number, None) instead of "end" asks for a new process for the rest;
("about", number, anything) is for the whole run."""


def in_processes(
    work: Work,
    jobs: Sequence[Job],
    *,
    group: Callable[[Job], str],
    silence: float,
    deadline: float = float("inf"),
) -> Iterator[tuple[str, int, Any]]:
    """What a child sends of "row" and "about", and ("problem", job, text) or ("dropped", job, text) of what it cannot.

    A job that ends its process, or says nothing for `silence` seconds, is a problem; the other jobs of its group that
    are left are dropped, and a new process does the rest. At the deadline (time.monotonic) the process is ended, and
    all that is left is dropped.

    work: has to be importable by name, for the child starts with a fresh interpreter.
    """
    left = dict(enumerate(jobs))
    while left:
        child = _Child(work, list(left.items()))
        current: int | None = None
        problem = ""
        while not problem:
            late = deadline - time.monotonic()
            try:
                message = child.receive(min(silence, late))
            except TimeoutError:
                over = late <= silence
                problem = (
                    "the time for the whole run was over" if over else f"no answer within {silence:.0f} s"
                )
                break
            if isinstance(message, str):
                problem = message
                break
            kind, number, content = message
            if kind == "begin":
                current = number
            elif kind in ("end", "restart"):
                left.pop(number, None)
                current = None
                if kind == "restart" or not left:
                    break
            else:
                yield kind, number, content
        child.stop()
        if not problem:
            continue
        over = time.monotonic() >= deadline
        if current is None or over:
            # Nobody to blame: the process did not even begin, or there is no time to go on.
            for number in left:
                yield ("dropped" if over else "problem"), number, problem
            return
        guilty = group(left.pop(current))
        yield "problem", current, problem
        for number in [number for number, job in left.items() if group(job) == guilty]:
            del left[number]
            yield "dropped", number, f"another case of the op ended its process: {problem}"


class _Child:
    def __init__(self, work: Work, jobs: list[tuple[int, Job]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(work, jobs, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self, seconds: float) -> tuple[str, int, Any] | str:
        """The next message, or how the process ended.

        Raises:
            TimeoutError: neither came.
        """
        if not self._pipe.poll(max(seconds, 0.0)):
            raise TimeoutError
        try:
            message: tuple[str, int, Any] = self._pipe.recv()
            return message
        except EOFError:
            self._process.join(5)
            code = self._process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            return f"its process ended with {how}"

    def stop(self) -> None:
        """Ends the process, also one that waits for a device that never answers."""
        self._process.join(2)  # one that is done needs a moment to leave
        self._process.kill()
        self._process.join(10)
        self._pipe.close()


def _run(work: Work, jobs: list[tuple[int, Job]], pipe: Connection) -> None:
    """In the child: standard output belongs to the parent's result."""
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), 1)

    def send(kind: str, number: int, content: Any) -> None:
        pipe.send((kind, number, content))

    work(jobs, send)
    pipe.close()
