"""What dies, fills up or disagrees, tried many times: nothing may be lost, and whatever is wrong is said in a line.

    python tests/campaign.py                       everything: some 50 minutes on a core
    python tests/campaign.py kills --count 50      SIGKILL at random moments, then RESUME=1: equal artifacts
    python tests/campaign.py disk                  a disk (a tmpfs) that is full at one write after the other
    python tests/campaign.py ranks                 one of two processes stopped, killed, with other data, other code
    python tests/campaign.py inputs --count 100000     bench/fuzz.py: damaged inputs to every loader

Runs are tiny: five presets at the small size of bench/arms.py on synthetic data, one and two processes. It ends with a table of
counts. Exit code 1 if anything was lost or unclear; what cannot be tried here is a row that says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "tools")]

from command_line import OneLineParser  # noqa: E402
from conftest import ROOT, family, make_data  # noqa: E402

PRESETS = ("default", "pr126_60m", "pr139", "pr367", "pr435")  # NeoMuon; recurrence and 8 bits; binary; averages; FRO
STEPS, EVERY = 30, 4  # of a run, between two checkpoints
KEPT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")
LIMIT_S = 300  # of one run, on a core that others use too
ARTIFACT = "model.ptz"


class Row(NamedTuple):
    """A line of the table."""

    part: str
    what: str
    held: int
    tried: int
    note: str = ""


def check(failures: list[str], what: str, holds: bool, shown: str = "") -> bool:
    """Note what does not hold, with what shows it."""
    if not holds:
        failures.append(what)
        print(f"FAILED {what}\n{shown[-1500:]}", flush=True)
    return holds


# -------------------------------------------------------------------------------------------------- runs


def settings(preset: str, data: Path, **more: object) -> dict[str, str]:
    """A preset at a tiny size, scored on a few tokens, with checkpoints; it always goes on from one that is there."""
    from test_presets import tiny_arm

    own = {"iterations": STEPS, "checkpoint_every": EVERY, "resume": 1, "train_log_every": 1, "sliding_eval": 0, "temp_scaling": 0,
           "max_wallclock_seconds": 0, "artifact_path": ARTIFACT, "val_max_tokens": 256}  # fmt: skip
    return tiny_arm(preset, data, **own | more)


def start(env: dict[str, str], folder: Path, processes: int = 1, restarts: int = 0, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """train_gpt.py in a folder, its output in `out` and `err` there; torchrun for two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    script = [str(ROOT / "train_gpt.py")]
    if processes > 1:
        script = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
                  "--monitor-interval=0.1", *script]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k in KEPT} | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(folder / "out", "ab") as out, open(folder / "err", "ab") as err:
        return subprocess.Popen([*before, sys.executable, *script], cwd=folder, env=clean | env, stdout=out, stderr=err, start_new_session=True)


def kill_all(child: subprocess.Popen) -> None:
    """The machine goes away: every process of the run, at once."""
    for pid in family(child.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def finish(child: subprocess.Popen, limit_s: float = LIMIT_S) -> int | None:
    """Exit code; None for a run that had to be ended."""
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        kill_all(child)
        return None


def text(folder: Path, name: str = "err") -> str:
    path = folder / name
    return path.read_text(errors="replace") if path.exists() else ""


def digest(folder: Path) -> str:
    """SHA-256 of the artifact, "none" without one."""
    path = folder / ARTIFACT
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"


def result_of(folder: Path) -> dict:
    return json.loads(text(folder, "out").rpartition("\nresult ")[2].partition("\n")[0])


def wait_for(child: subprocess.Popen, happened: Callable[[], bool], limit_s: float = LIMIT_S) -> bool:
    """Whether it happened before the run's end."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if happened():
            return True
        if child.poll() is not None:
            return False
        time.sleep(0.0005)
    return False


# -------------------------------------------------------------------------------------------------- kills


class Moment(NamedTuple):
    """When a run is killed."""

    kind: str
    step: int = 0  # once the log has this step
    delay_s: float = 0.0  # and so long after it


def draw_moment(rng: random.Random, number: int) -> Moment:
    """Two of five while a checkpoint is being written, one in ten before the first step, one in ten after the last."""
    kind = ("writing", "training", "training", "writing", "training", "start", "writing", "training", "writing", "end")[number % 10]
    step = {"start": 0, "end": STEPS}.get(kind, rng.randrange(1, STEPS - EVERY))
    return Moment(kind, step, rng.uniform(0, {"start": 4, "end": 0.3}.get(kind, 0.15)))


def partial_files(folder: Path) -> list[Path]:
    """Checkpoints that are being written; the heartbeat's file is smaller."""
    found = []
    for path in (folder / "checkpoints").glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it has its name by now
            found += [path] * (path.stat().st_size > 1000)
    return found


def wait_until(moment: Moment, child: subprocess.Popen, folder: Path) -> None:
    out = folder / "out"
    at = f"\nstep:{moment.step}/".encode()
    if moment.step and not wait_for(child, lambda: at in b"\n" + out.read_bytes()):
        return
    if moment.kind == "writing":
        wait_for(child, lambda: bool(partial_files(folder)))
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(moment.delay_s)


def kills(place: Path, data: Path, count: int | None, seed: int) -> Iterator[Row]:
    """Killed at a random moment and gone on with, a run ends with the bytes of one that never was."""
    rng, expected, failures = random.Random(seed), {}, []
    tried: dict[str, list[bool]] = {}
    partials = 0
    for number in range(50 if count is None else count):
        preset, processes = PRESETS[number // 2 % len(PRESETS)], 1 + number % 2
        env = settings(preset, data)
        if (preset, processes) not in expected:
            whole = place / f"whole {preset} {processes}"
            code = finish(start(env | {"CHECKPOINT_EVERY": "0"}, whole, processes))
            expected[preset, processes] = digest(whole)
            check(failures, f"a whole run of {preset} on {processes}", code == 0, text(whole))
        moment, folder = draw_moment(rng, number // 2), place / f"kill {number}"
        one = processes > 1 and rng.random() < 0.5  # of two processes: torchrun starts both anew
        child = start(env, folder, processes, restarts=2 * one)
        wait_until(moment, child, folder)
        ranks = family(child.pid)[1:]
        if one and len(ranks) >= 2 and child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(ranks), signal.SIGKILL)
            partials += bool(partial_files(folder))
            code = finish(child)
        else:
            ended = child.poll() is not None
            kill_all(child)
            partials += bool(partial_files(folder))
            code = 0 if ended else finish(start(env, folder, processes))
        kind = f"{moment.kind}, {processes} process{'es' * (processes > 1)}{', one killed' * one}"
        what = f"kill {number}: {preset}, {kind} {moment}: exit code {code}"
        held = check(failures, what, code == 0 and digest(folder) == expected[preset, processes] != "none", text(folder))
        tried.setdefault(kind, []).append(held)
        print(f"kill {number}: {preset}, {kind}, step {moment.step}: {'equal' if held else 'LOST'}", flush=True)
        if held:
            shutil.rmtree(folder)
    for kind in sorted(tried):
        yield Row("kills", kind, sum(tried[kind]), len(tried[kind]))
    yield Row("kills", "whole runs to compare with", len(expected) - sum("whole" in f for f in failures), len(expected),
              f"{partials} kills left a half-written checkpoint")  # fmt: skip


PARTS = {"kills": kills}


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--count", type=int, help="of each part (default: 50 kills, 100,000 inputs a loader)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where runs go; those that failed stay (default: the folder for temporary files)")
    args = parser.parse_args(argv)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r}: expected {', '.join(PARTS)}")
    place = Path(tempfile.mkdtemp(prefix="campaign ", dir=args.folder))
    (place / "data").mkdir()
    data, began = make_data(place / "data"), time.monotonic()
    rows = []
    for part in args.parts or PARTS:
        rows += PARTS[part](place / part, data, args.count, args.seed)
    print(f"seed {args.seed}, {time.monotonic() - began:.0f} s\n\n| part | what | held | tried | note |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.part} | {row.what} | {row.held:,} | {row.tried:,} | {row.note} |")
    bad = sum(row.tried - row.held for row in rows)
    print(f"\n{bad} lost or unclear")
    if not bad:
        shutil.rmtree(place)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
