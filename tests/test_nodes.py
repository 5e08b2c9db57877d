"""Several machines: two hosts of two processes train as one of four does; data on one host alone is said; the examples are sound."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import conftest
import nodes
import pytest
from conftest import ROOT, TINY

import train_gpt

EXAMPLES = ROOT / "examples"
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


@pytest.mark.campaign
def test_two_hosts_train_as_one_does(hosts, data_dir, tmp_path):
    """The hosts have no folder in common; the artifact is written by the first and scored on both."""
    env = settings(data_dir)
    assert nodes.wait_all([hosts.start(0, tmp_path / "one", env, nodes=1, processes=4)], 150) == [0], (tmp_path / "one/err").read_text()[-2000:]
    both = [hosts.start(host, tmp_path / name, env) for host, name in enumerate("ab")]
    assert nodes.wait_all(both, 150) == [0, 0], [(tmp_path / name / "err").read_text()[-2000:] for name in "ab"]
    assert figures(tmp_path / "a") == figures(tmp_path / "one") and figures(tmp_path / "a")["world_size"] == 4
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["err", "out"]


@pytest.mark.campaign
def test_data_on_one_host_alone_are_said(hosts, data_dir, tmp_path):
    """The second host has no data: its first process says which folder, and both hosts end."""
    missing = tmp_path / "nothing here"
    both = [hosts.start(host, tmp_path / name, settings(data_dir) | {"DATA_PATH": str(data_dir if name == "a" else missing)})
            for host, name in enumerate("ab")]  # fmt: skip
    codes = nodes.wait_all(both, 150)
    said = (tmp_path / "b/err").read_text()
    assert codes[1] not in (0, None) and codes[0] not in (0, None)
    assert re.findall(rf"^train_gpt.py: .*DATA_PATH='{missing}': no fineweb_.*\(rank 2 of 4, on .+\)$", said, re.MULTILINE), said[-2000:]


def stub(folder, name, text):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def torchrun_of(command, folder, **env):
    """The words after "-m torch.distributed.run" and the settings that train_gpt.py would see, of a script that starts it."""
    python = stub(folder, "python", 'printf "%s\\n" "$@"; echo --; env -0 | tr "\\n\\0" " \\n"')
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=env | {"PATH": path, "TRAIN_PYTHON": python}, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    words, _, settings = done.stdout.partition("--\n")
    module, *words = words.split("\n")[:-1]
    assert (module, words[0], words[-1]) == ("-m", "torch.distributed.run", "train_gpt.py")
    return words[1:-1], dict(line.split("=", 1) for line in settings.splitlines())


def test_the_command_of_several_machines(tmp_path):
    words, settings = torchrun_of(["bash", "examples/two_nodes.sh"], tmp_path, HEAD="10.0.0.1", NODES="2")
    assert words == ["--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:29500", "--rdzv-id=train", "--max-restarts=3"]
    assert settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1" and train_gpt.Config.from_env(settings).resume == "1"


def test_the_slurm_script_starts_one_task_a_machine(tmp_path):
    stub(tmp_path, "scontrol", '[[ $* == "show hostnames node[7-8]" ]] && printf "node7\\nnode8\\n"')
    stub(tmp_path, "srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    env = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "99"}
    words, settings = torchrun_of(["bash", "examples/slurm.sbatch"], tmp_path, **env)
    assert words[:2] == ["--nnodes=2", "--nproc-per-node=4"] and {"--rdzv-endpoint=node7:29500", "--rdzv-id=99"} < set(words)
    cfg = train_gpt.Config.from_env(settings)
    assert (cfg.run_id, cfg.checkpoint_dir, cfg.checkpoint_every) == ("slurm_99", "checkpoints/slurm_99", "600s")
    assert "#SBATCH --ntasks-per-node=1\n" in (EXAMPLES / "slurm.sbatch").read_text()


def test_the_skypilot_task_runs_the_same_command(tmp_path):
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert task.keys() <= {"name", "num_nodes", "workdir", "resources", "file_mounts", "envs", "setup", "run"} and task["num_nodes"] == 2
    assert all(type(value) is str for value in task["envs"].values())
    env = task["envs"] | {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    words, settings = torchrun_of(["bash", "-euc", task["run"]], tmp_path, **env)
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=10.0.0.5:29500"} < set(words)
    assert train_gpt.Config.from_env(settings).checkpoint_dir in task["file_mounts"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_queue_may_signal_every_process(name, data_dir, tmp_path):
    """SLURM's signal comes to torchrun, which passes it on, and to its processes: they end the step and leave a checkpoint."""
    env = settings(data_dir, iterations=10**6, checkpoint_every=10**5, train_log_every=1)
    paths = {name: str(tmp_path / name) for name in ("LOG_DIR", "ARTIFACT_PATH", "CHECKPOINT_DIR")}
    own = {"HEAD": "127.0.0.1", "NODES": "1", "GPUS": "2", "PORT": "29713", "RESTARTS": "0", "TRAIN_PYTHON": sys.executable,
           "PYTHON_EXEC": conftest.python()}  # fmt: skip
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        child = subprocess.Popen(["bash", "examples/two_nodes.sh", "--monitor-interval=0.1"], cwd=ROOT, env=conftest.clean_env() | env | paths | own,
                                 stdout=out, stderr=err, start_new_session=True)  # fmt: skip
    until = time.monotonic() + 120
    while "\nstep:4/" not in (tmp_path / "out").read_text() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    for pid in conftest.family(child.pid):
        os.kill(pid, signal.Signals[name])
    assert nodes.wait_all([child], 60)[0] not in (0, None)  # torchrun's own exit code after a signal
    said = (tmp_path / "err").read_text()
    assert said.count(f"train_gpt.py: stopped by {name}\n") == 1, said[-2000:]
    (path,) = (tmp_path / "CHECKPOINT_DIR").glob("*.ckpt")
    assert train_gpt.read_checkpoint(path)[0]["step"] >= 4


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*s*h*")), ids=lambda path: path.name)
def test_the_scripts_are_whole(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
