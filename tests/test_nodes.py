"""Several machines: two hosts of two processes train as one of four does; data on one host alone is said; the examples are sound."""

from __future__ import annotations

import json
import re
import subprocess

import nodes
import pytest
from conftest import ROOT, TINY

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def hosts():
    try:
        with nodes.hosts() as made:
            yield made
    except OSError as error:
        pytest.skip(str(error))


def settings(data_dir, **more):
    paths = {"DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model"), "SLIDING_EVAL": "0", "TEMP_SCALING": "0", "RUN_ID": "x"}
    return TINY | paths | {"ITERATIONS": "6", "VAL_MAX_TOKENS": "256"} | {name.upper(): str(value) for name, value in more.items()}


def figures(folder):
    result = json.loads((folder / "out").read_text().rpartition("\nresult ")[2].partition("\n")[0])
    return {name: result[name] for name in ("first_losses", "val_bpb", "roundtrip_val_bpb", "artifact_sha256", "world_size")}


def test_two_hosts_train_as_one_does(hosts, data_dir, tmp_path):
    """The hosts have no folder in common; the artifact is written by the first and scored on both."""
    env = settings(data_dir)
    assert nodes.wait_all([hosts.start(0, tmp_path / "one", env, nodes=1, processes=4)], 150) == [0], (tmp_path / "one/err").read_text()[-2000:]
    both = [hosts.start(host, tmp_path / name, env) for host, name in enumerate("ab")]
    assert nodes.wait_all(both, 150) == [0, 0], [(tmp_path / name / "err").read_text()[-2000:] for name in "ab"]
    assert figures(tmp_path / "a") == figures(tmp_path / "one") and figures(tmp_path / "a")["world_size"] == 4
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["err", "out"]


def test_data_on_one_host_alone_are_said(hosts, data_dir, tmp_path):
    """The second host has no data: its first process says which folder, and both hosts end."""
    missing = tmp_path / "nothing here"
    both = [hosts.start(host, tmp_path / name, settings(data_dir) | {"DATA_PATH": str(data_dir if name == "a" else missing)})
            for host, name in enumerate("ab")]  # fmt: skip
    codes = nodes.wait_all(both, 150)
    said = (tmp_path / "b/err").read_text()
    assert codes[1] not in (0, None) and codes[0] not in (0, None)
    assert re.findall(rf"^train_gpt.py: .*DATA_PATH='{missing}': no fineweb_.*\(rank 2 of 4, on .+\)$", said, re.MULTILINE), said[-2000:]
