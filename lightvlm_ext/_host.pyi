from collections.abc import Sequence

def keep_counts(total: int, fractions: Sequence[float]) -> list[int]:
    """Tokens of an image that are left after each stage of a schedule.

    n_t = max(1, floor(fractions[t] * total + 0.5)), never more than at the stage before; 0 throughout
    for an image of no tokens.

    Args:
        total: tokens of the image, >= 0.
        fractions: for each stage, the share of `total` to keep, in [0, 1].

    Raises:
        ValueError: a number is out of its range.
    """

def module_info() -> dict[str, str]:
    """Version of this module (version), and the Python and pybind11 it was built with."""

class OutOfPages(RuntimeError):
    """A pool has fewer free pages than a call needs. The call has changed nothing."""

class PagePool:
    """Which pages of a paged KV cache are free, and how many users each of the others has.

    Pages are numbered from 0; the lowest free ones are given out first, so the same calls give the same pages.
    A call does all that it says, or raises and changes nothing. Calls from several threads are safe: each is
    one step under the interpreter's lock. The pool counts; which sequence has which page is its user's to know.
    """

    def __init__(self, pages: int) -> None:
        """A pool of so many pages, all free.

        Raises:
            ValueError: pages is negative or above 2**31 - 1.
        """

    @property
    def pages(self) -> int:
        """How many pages there are, free or not."""

    @property
    def available(self) -> int:
        """How many are free."""

    def allocate(self, n: int) -> list[int]:
        """The n lowest free pages, ascending, with one user each.

        Raises:
            ValueError: n is negative.
            OutOfPages: fewer are free.
        """

    def free(self, ids: Sequence[int]) -> None:
        """Takes one user from each page, as often as it is named; a page without users is free again.

        Raises:
            ValueError: a page does not exist, is free, or is named more often than it has users.
        """

    def share(self, ids: Sequence[int]) -> None:
        """Gives each page one user more: another sequence begins with it.

        Raises:
            ValueError: a page does not exist or is free.
        """

    def refcount(self, ids: Sequence[int]) -> list[int]:
        """Users of each page, 0 for a free one.

        Raises:
            ValueError: a page does not exist.
        """

    def refcounts(self) -> list[int]:
        """Users of all pages: what compact_paged_kv_ takes as refcount, as an int32 tensor."""

    def copy_on_write(
        self, pages: Sequence[int], begin: int, end: int, *, page_size: int
    ) -> list[tuple[int, int]]:
        """Makes room for writing tokens [begin, end) of a sequence, where other sequences use its pages too.

        Each page there that has other users loses this one, and a new page takes its place: the caller copies the
        one to the other and puts the new one into the sequence's block table.

        Args:
            pages: of the sequence, block by block.
            begin, end: the tokens to be written.
            page_size: tokens of a page.

        Returns:
            (page, new page) for each shared page, in the order of the blocks; empty where nothing is shared.

        Raises:
            ValueError: a page does not exist or is free, or the tokens are not all in these pages.
            OutOfPages: too few are free.
        """

    def reset(self) -> None:
        """Makes all pages free."""
