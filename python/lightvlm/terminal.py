"""What the commands print with: tables on standard output, progress on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

_NARROWEST = 120


def print_table(table: Table) -> None:
    """Print a table; into a file or a pipe it is as wide as it likes to be."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_NARROWEST)
    console.print(table)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on standard error; silent where that is no terminal, gone when it ends."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar
