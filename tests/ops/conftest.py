"""Marks the tests that a parameter sends to a GPU."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not ask for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        # By attribute: the folder may be imported under two names, and its classes exist twice then.
        if parameters and any(getattr(value, "needs_gpu", False) for value in parameters.params.values()):
            item.add_marker("gpu")
