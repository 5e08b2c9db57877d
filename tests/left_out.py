"""How many tests `-m "not campaign"` leaves out: pytest's hooks, for conftest.py."""

from __future__ import annotations

import pytest


def pytest_deselected(items: list[pytest.Item]) -> None:
    """How many tests `-m "not campaign"` leaves out; a worker of pytest-xdist tells its controller, as all of them do."""
    for item in items:
        if item.get_closest_marker("campaign"):
            notes = getattr(item.config, "workeroutput", vars(item.config))
            notes["left_out"] = notes.get("left_out", 0) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    vars(node.config)["left_out"] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: object, config: pytest.Config) -> None:
    if count := vars(config).get("left_out", 0):
        terminalreporter.write_line(f"{count} tests left out, marked campaign: bash run_tests.sh -m campaign, or python tests/campaign.py suite")
