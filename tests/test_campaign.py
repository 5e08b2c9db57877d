"""tests/campaign.py, a little of each part; docs/faults.md names tests that there are."""

from __future__ import annotations

import ast
import re

import campaign
import pytest
from conftest import ROOT

pytestmark = pytest.mark.timeout(300)


def test_killed_runs_end_alike(tmp_path, data_dir):
    """One of two processes is killed while a checkpoint is being written, and torchrun starts both again."""
    table = list(campaign.kills(tmp_path, data_dir, 1, 0, first=1))
    assert [(row.what, row.held, row.tried) for row in table[:1]] == [("writing, 2 processes, one killed", 1, 1)]


def test_a_run_that_is_lost_is_counted(tmp_path, data_dir, monkeypatch):
    monkeypatch.setattr(campaign, "digest", lambda folder: folder.name)
    monkeypatch.setattr(campaign, "start", lambda *_, **__: campaign.subprocess.Popen(["true"]))
    monkeypatch.setattr(campaign, "wait_until", lambda *_: None)
    table = list(campaign.kills(tmp_path, data_dir, 2, 0))
    assert [(row.held, row.tried) for row in table if row.what.startswith("writing")] == [(0, 1), (0, 1)]


def test_a_full_disk_costs_nothing_that_was_there(tmp_path, data_dir):
    table = list(campaign.disk(tmp_path, data_dir, 2, 0))
    if not table[0].tried:
        pytest.skip(table[0].what)
    assert all(row.held == row.tried for row in table) and sum(row.tried for row in table) == 2


def test_a_part_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        campaign.main(["kill"])
    assert capsys.readouterr().err == f"{campaign.Path(campaign.sys.argv[0]).name}: error: 'kill': expected {', '.join(campaign.PARTS)}\n"


def test_the_page_of_faults_names_tests_that_there_are():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs/faults.md").read_text())
    assert len(named) > 15
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, name)
