"""bench/same.py: what it finds different, that its cases are settings of the trainer, and both answers end to end."""

from __future__ import annotations

import subprocess
import sys

import pytest
import same
from conftest import ROOT, tiny_model

from train_gpt import Config, save_artifact

CASES = same.training_cases(ROOT)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([5.1, 4.9], [5.1, 4.9], ""),
        ([5.1, 4.9], [5.1, 4.900000000000001], "[1] 4.9 / 4.900000000000001"),
        ([5.1, 4.9], [5.1], "2 and 1 entries"),
        ({"a": 1, "b": {"c": None}}, {"b": {"c": None}, "a": 1}, ""),
        ({"a": 1}, {"a": 1.0}, "a: 1 / 1.0"),
        ({"a": 1}, {"b": 1}, "a: 1 / nothing, b: nothing / 1"),
        (dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 1), "a: 0 / 1, b: 0 / 1, c: 0 / 1 and 2 more"),
    ],
)
def test_a_difference_is_the_first_one_to_the_last_bit(ours, theirs, said):
    assert same.difference(ours, theirs) == said


def test_an_artifact_is_its_header_and_its_streams():
    model = tiny_model(artifact_codec="ans")
    blob = save_artifact(model, model.cfg)
    assert same.header(blob)[-2:] == ["codec=ans", "temperature=1.0"]
    model.temperature.fill_(1.5)
    warmer = save_artifact(model, model.cfg)
    assert same.streams(warmer) == same.streams(blob)
    assert same.difference(same.header(blob), same.header(warmer)).endswith("temperature=1.0 / temperature=1.5")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_config(case):
    assert Config.from_env(case.settings).iterations <= 24


def test_cases_and_presets_are_all_there_and_run_once():
    presets = {path.stem for path in (ROOT / "configs").glob("*.env")}
    assert {case.preset for case in CASES if case.preset} == presets and presets <= same.PRESET_SHAPES.keys()
    keys = [case.key for case in CASES]
    assert len(set(keys)) == len(keys)


def test_a_row_says_what_differs_and_forgives_a_librarys_bytes():
    row = same.Row("SMEAR=1", {"losses": "", "artifact": "streams differ: 5 and 6 bytes"})
    assert not row.same and row.markdown().count("same") == 1 and row.markdown().count("**differs**") == 1
    row.harmless = True
    assert row.same and "(bytes)" in row.markdown()


@pytest.mark.campaign
def test_a_change_of_one_activation_is_found_where_it_is_and_nowhere_else(tmp_path):
    source = (ROOT / "train_gpt.py").read_text()
    assert source.count("F.leaky_relu") == 1
    (tmp_path / "train_gpt.py").write_text(source.replace("F.leaky_relu", "F.elu"))
    command = [sys.executable, "bench/same.py", str(ROOT), str(tmp_path), "--cache", str(tmp_path / "cache")]
    only = ["--only", "^ACTIVATION=leaky_relu$", "^SMEAR=1$"]
    done = subprocess.run([*command, *only], cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 1, done
    assert "| SMEAR=1 | same | same | same | same | same | same | same |" in done.stdout
    assert "- ACTIVATION=leaky_relu, losses: [" in done.stdout and "1 of 2 cases are the same" in done.stdout
