"""tests/campaign.py, a little of each part; docs/faults.md names tests that there are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import campaign
import pytest
from conftest import ROOT

pytestmark = pytest.mark.timeout(300)


@pytest.mark.campaign
def test_killed_runs_end_alike(tmp_path, data_dir):
    """One of two processes is killed while a checkpoint is being written, and torchrun starts both again."""
    table = list(campaign.kills(tmp_path, data_dir, 1, 1, first=1))  # the seed draws one process
    assert [(row.what, row.held, row.tried) for row in table[:1]] == [("writing, 2 processes, one killed", 1, 1)]


def test_a_run_that_is_lost_is_counted(tmp_path, data_dir, monkeypatch):
    monkeypatch.setattr(campaign, "digest", lambda folder: folder.name)
    monkeypatch.setattr(campaign, "start", lambda *_, **__: campaign.subprocess.Popen(["true"]))
    monkeypatch.setattr(campaign, "wait_until", lambda *_: None)
    table = list(campaign.kills(tmp_path, data_dir, 2, 0))
    assert [(row.held, row.tried) for row in table if row.what.startswith("writing")] == [(0, 1), (0, 1)]


@pytest.mark.campaign
def test_a_full_disk_costs_nothing_that_was_there(tmp_path, data_dir):
    table = list(campaign.disk(tmp_path, data_dir, 2, 0))
    if not table[0].tried:
        pytest.skip(table[0].what)
    assert all(row.held == row.tried for row in table) and sum(row.tried for row in table) == 2


def test_what_the_suite_says_is_counted(tmp_path, monkeypatch):
    """Passed, failed and left out for want of a tool, of pytest's own last lines."""
    said = "SKIPPED [2] tests/a.py:5: no Chromium starts here\nFAILED tests/a.py::test_b\n1 failed, 7 passed, 2 skipped, 9 deselected in 3.21s\n"
    done = campaign.subprocess.CompletedProcess([], 1, said, "")
    monkeypatch.setattr(campaign.subprocess, "run", lambda *_, **__: done)
    table = list(campaign.suite(tmp_path, tmp_path, None, 0))
    assert [(row.what, row.held, row.tried, row.note) for row in table] == [
        ("marked tests", 7, 8, "2 skipped"), ("not tried", 0, 0, "2: no Chromium starts here"),
    ]  # fmt: skip


@pytest.mark.campaign
def test_run_tests_says_how_many_tests_it_leaves_out(tmp_path):
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_a(): pass\n@pytest.mark.campaign\ndef test_b(): pass\n@pytest.mark.campaign\ndef test_c(): pass\n")
    hooks = "pytest_deselected, pytest_terminal_summary, pytest_testnodedown"
    assert f"from left_out import {hooks}" in (ROOT / "tests/conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\nfrom left_out import {hooks}\n")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-m", "not campaign"]
    for processes in ([], ["-n", "2"]):
        done = subprocess.run([*command, *processes, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and "1 passed" in done.stdout and "2 tests left out, marked campaign: bash run_tests.sh" in done.stdout, done.stdout


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
