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
