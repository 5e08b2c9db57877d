"""What dies, fills up or disagrees, tried many times: nothing may be lost, and whatever is wrong is said in a line.

    python tests/campaign.py                       everything: some 50 minutes on a core
    python tests/campaign.py kills --count 50      SIGKILL at random moments, then RESUME=1: equal artifacts
    python tests/campaign.py disk --count 24       a disk (a tmpfs) that is full at one place after the other
    python tests/campaign.py ranks hosts           one of two processes stopped, killed, with other data, other code; a cable cut
    python tests/campaign.py suite                 the tests that run_tests.sh leaves out
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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in (".", "../tools", "../bench")]

from command_line import OneLineParser  # noqa: E402
from conftest import ROOT, clean_env, family, make_data  # noqa: E402

PRESETS = ("default", "pr126_60m", "pr139", "pr367", "pr435")  # NeoMuon; recurrence and 8 bits; binary; averages; FRO
STEPS, EVERY = 30, 4  # of a run, between two checkpoints
LIMIT_S = 300  # of one run, on a core that others use too
ARTIFACT = "model.ptz"
MOST_DRAWS = 20  # of a moment that comes before the run's end


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


def start(env: dict[str, str], folder: Path, processes: int = 1, restarts: int = 0, before: tuple[str, ...] = (),
          script: Path = ROOT / "train_gpt.py") -> subprocess.Popen:  # fmt: skip
    """train_gpt.py in a folder, its output in `out` and `err` there; torchrun for two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(script)]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
                  "--monitor-interval=0.1", *words]  # fmt: skip
    clean = clean_env() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(folder / "out", "ab") as out, open(folder / "err", "ab") as err:
        return subprocess.Popen([*before, sys.executable, *words], cwd=folder, env=clean | env, stdout=out, stderr=err, start_new_session=True)


def kill_those(pids: list[int]) -> bool:
    """SIGKILL to each, at once; whether the first was still running (no zombie)."""
    ran = bool(pids) and running(pids[0])
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return ran


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill_all(child: subprocess.Popen) -> None:
    """The machine goes away: every process of the run."""
    kill_those(family(child.pid))
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


def kills(place: Path, data: Path, count: int | None, seed: int, first: int = 0) -> Iterator[Row]:
    """Killed at a random moment and gone on with, a run ends with the bytes of one that never was."""
    rng, expected, failures = random.Random(seed), {}, []
    tried: dict[str, list[bool]] = {}
    partials = too_late = 0
    for number in range(first, first + (50 if count is None else count)):
        preset, processes = PRESETS[number // 2 % len(PRESETS)], 1 + number % 2
        env = settings(preset, data)
        if (preset, processes) not in expected:
            whole = place / f"whole {preset} {processes}"
            code = finish(start(env | {"CHECKPOINT_EVERY": "0"}, whole, processes))
            expected[preset, processes] = digest(whole)
            check(failures, f"a whole run of {preset} on {processes}: exit code {code}", code == 0, text(whole))
        one = processes > 1 and rng.random() < 0.5  # of two processes: torchrun starts both anew
        for again in range(MOST_DRAWS):
            moment, folder = draw_moment(rng, number // 2), place / f"kill {number}.{again}"
            child = start(env, folder, processes, restarts=2 * one)
            wait_until(moment, child, folder)
            ranks = family(child.pid)[1:]
            victims = ([rng.choice(ranks)] if len(ranks) >= 2 else []) if one else family(child.pid)
            if killed := child.poll() is None and kill_those(victims):
                break
            too_late += 1  # it had ended: no kill, drawn again
            finish(child)
        partials += bool(partial_files(folder))
        if not one and killed:
            child.wait()
        code = finish(child) if one else finish(start(env, folder, processes))
        kind = f"{moment.kind}, {processes} process{'es' * (processes > 1)}{', one killed' * one}"
        what = f"kill {number}: {preset}, {kind} {moment}: killed {killed}, exit code {code}"
        held = check(failures, what, killed and code == 0 and digest(folder) == expected[preset, processes] != "none", text(folder))
        tried.setdefault(kind, []).append(held)
        print(f"kill {number}: {preset}, {kind}, step {moment.step}: {'equal' if held else 'LOST'}", flush=True)
        if held:
            shutil.rmtree(folder)
    for kind in sorted(tried):
        yield Row("kills", kind, sum(tried[kind]), len(tried[kind]))
    yield Row("kills", "whole runs to compare with", len(expected) - sum("whole" in f for f in failures), len(expected),
              f"{partials} kills left a half-written checkpoint; {too_late} runs had ended before theirs, which was drawn again")  # fmt: skip


# -------------------------------------------------------------------------------------------------- a full disk

# in a namespace of its own: a disk with what an earlier run left, the run, and a copy of what is there then. With a number
# of bytes all others are taken by somebody else, as soon as the run trains: it has found room enough before.
ON_A_DISK = """mount -t tmpfs -o size="$1" tmpfs "$2" && cp -a "$3/." "$2" && cd "$2" || exit 99
left=$4 free=$5; shift 5; "$@" & run=$!
if [ "$free" ]; then
  until grep -q ^step:1/ "$left/../out"; do kill -0 $run || break; sleep 0.01; done
  head -c $(($(df --output=avail -B1 . | tail -n 1) - free)) /dev/zero >ballast
fi
wait $run; code=$?; rm -f ballast; cp -a "$PWD/." "$left"; exit $code"""
ROOM = 1 << 26  # more than the run asks for


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 -> name of every file below."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in sorted(folder.rglob("*")) if path.is_file()}


def disk(place: Path, data: Path, count: int | None, seed: int) -> Iterator[Row]:
    """The disk is small from the start, or fills up while the run trains, and is full at one place after the other: what an earlier run left is
    whole, and the artifact is somewhere or a line says why not."""
    earlier, whole = place / "earlier", place / "whole"
    env = settings("default", data, resume="", iterations=12)
    failures: list[str] = []
    for folder, own in ((earlier, {"SEED": "1", "RUN_ID": "earlier"}), (whole, {"SEED": str(2 + seed)})):
        check(failures, f"the run in {folder.name}", finish(start(env | own, folder)) == 0, text(folder))
    for name in ("out", "err", "checkpoints/heartbeat.json"):  # the last is the run's that is on
        (earlier / name).unlink(missing_ok=True)
    try:
        subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(earlier / "logs")], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        yield Row("disk", f"not tried: no small disk can be mounted here ({error})", 0, 0)
        return
    used, needed = (sum(path.stat().st_size + 4096 for path in folder.rglob("*") if path.is_file()) for folder in (earlier, whole))
    levels = 24 if count is None else count
    ended: dict[str, list[bool]] = {}
    met = 0
    for level in range(levels):
        folder = place / f"disk {level}"
        # the log comes first and is small beside the checkpoints: finer steps there
        free = int(needed * (level / (levels - 1 or 1)) ** 3) + 4096
        mounted, left = folder / "small", folder / "left"
        for path in (mounted, left, folder / "tmp"):
            path.mkdir(parents=True)
        late = level % 2 == 1
        size, rest = (used + needed + ROOM, str(free)) if late else (used + free, "")
        before = ("unshare", "-m", "sh", "-c", ON_A_DISK, "sh", str(size), str(mounted), str(earlier), str(left), rest)
        code = finish(start(env | {"SEED": str(2 + seed), "TMPDIR": str(folder / "tmp")}, folder, before=before))
        err, found = text(folder), contents(left) | contents(folder / "tmp")
        said = "Traceback" not in err and (code == 0 or code == 2 and err.splitlines()[-1].startswith("train_gpt.py: "))
        kept = contents(earlier).keys() <= found.keys() and not any(name.endswith(".partial") for name in found.values())
        artifact = code == 2 or digest(whole) in found
        holds = check(failures, f"disk {level}: {free:,} bytes free{' from step 1 on' * late}: exit code {code}, kept {kept}, artifact {artifact}", said and kept and artifact, err)
        kind = "trained and exported" if code == 0 else "one line, exit code 2"
        ended.setdefault(f"{'full while it trains' if late else 'small'}: {kind}", []).append(holds)
        warned = [line for line in (text(folder, "out") + err).splitlines() if "cannot be written" in line or "ends here" in line]
        met += late and bool(warned)
        said_last = (err.strip() or "\n".join(warned) or "nothing said").splitlines()[-1]
        print(f"disk {level}: {free:,} bytes free{' from step 1 on' * late}: exit code {code}, {len(warned)} warnings: {said_last}", flush=True)
        shutil.rmtree(folder)
    for kind in sorted(ended):
        note = f"; {met} met the full disk and said so" * kind.startswith("full")
        yield Row("disk", kind, sum(ended[kind]), len(ended[kind]), f"earlier files untouched{note}")


# -------------------------------------------------------------------------------------------------- one of two processes

# runs train_gpt.py with what differs on rank 1
ONE_DIFFERS = """import os, runpy, sys, time
sys.argv = [{script!r}]
if os.environ["RANK"] == "1":
    {difference}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DIFFERENCES = {
    "other data": "os.environ['DATA_PATH'] = {other!r}",
    "other code": "sys.argv = [{copy!r}]",
    "another setting": "os.environ['MATRIX_LR'] = '0.011'",
}
CLOCK_APART = "true = time.perf_counter; time.perf_counter = lambda: true() * 1.5 + 5"
ENDED_S = 120  # an unsound run ends within a minute, on a core that others use too


def other_data(place: Path, data: Path) -> Path:
    """The data with one token of the last training shard changed."""
    other = place / "other data"
    shutil.copytree(data, other)
    path = sorted(other.glob("fineweb_train_*.bin"))[-1]
    changed = bytearray(path.read_bytes())
    changed[-2] ^= 1
    path.write_bytes(changed)
    return other


def ranks(place: Path, data: Path, count: int | None, seed: int) -> Iterator[Row]:  # noqa: ARG001
    """One of two processes dies, stands still or is another: the run ends, and says which."""
    place.mkdir(parents=True)
    failures: list[str] = []
    copy = place / "other_code.py"
    copy.write_bytes((ROOT / "train_gpt.py").read_bytes() + b"# changed\n")
    other = other_data(place, data)
    for what, difference in DIFFERENCES.items():
        folder, wrapper = place / what, place / f"{what}.py"
        difference = difference.format(other=str(other), copy=str(copy))
        wrapper.write_text(ONE_DIFFERS.format(script=str(ROOT / "train_gpt.py"), difference=difference))
        code = finish(start(settings("default", data), folder, 2, script=wrapper), ENDED_S)
        before = "\nstep:" not in text(folder, "out")
        named = any(line.startswith("train_gpt.py: ") and "rank 1" in line for line in text(folder).splitlines())
        shown = f"{what}: exit code {code}, before the first step {before}, named {named}"
        yield Row("ranks", what, int(check(failures, shown, code not in (0, None) and before and named, text(folder))), 1)
    for name in ("SIGSTOP", "SIGKILL"):
        folder = place / name
        child = start(settings("default", data, iterations=10**6, checkpoint_every=0), folder, 2)
        began = wait_for(child, lambda folder=folder: b"\nstep:3/" in (folder / "out").read_bytes())
        victims = [pid for pid in family(child.pid)[1:] if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        if began and victims:
            os.kill(victims[0], getattr(signal, name))
        code = finish(child, ENDED_S)
        named = "rank 1" in text(folder) or "(local_rank: 1)" in text(folder)
        alive = [pid for pid in victims if Path(f"/proc/{pid}").exists()]
        shown = f"{name}: exit code {code}, named {named}, still there {alive}"
        yield Row("ranks", f"one gets {name}", int(check(failures, shown, code not in (0, None) and named and not alive, text(folder))), 1)
    folder, wrapper = place / "clocks", place / "clocks.py"
    wrapper.write_text(ONE_DIFFERS.format(script=str(ROOT / "train_gpt.py"), difference=CLOCK_APART))
    code = finish(start(settings("default", data, max_wallclock_seconds=5, iterations=10**6), folder, 2, script=wrapper))
    yield Row("ranks", "clocks apart", int(check(failures, f"clocks apart: exit code {code}", code == 0, text(folder))), 1)


def hosts(place: Path, data: Path, count: int | None, seed: int) -> Iterator[Row]:  # noqa: ARG001
    """Two hosts by examples/two_nodes.sh: the cable between them is cut, or the second one stands still."""
    import nodes

    for what, held, note in (("the cable is cut", cable_is_cut, "both end"), ("the second host is frozen", host_is_frozen, "the first ends, the second once it runs again")):
        try:
            with nodes.hosts() as made:
                yield Row("hosts", what, *held(made, place / what, settings("default", data, iterations=10**6)), note)
        except OSError as error:
            yield Row("hosts", f"{what}: not tried: {error}", 0, 0)


def two_hosts(made: Any, place: Path, env: dict[str, str]) -> tuple[list[subprocess.Popen], list[Path]]:
    """Both have trained for three steps. Each writes to a folder of its own."""
    folders = [place / name for name in "ab"]
    paths = [{"LOG_DIR": str(f / "logs"), "ARTIFACT_PATH": str(f / ARTIFACT), "CHECKPOINT_DIR": str(f / "checkpoints")} for f in folders]
    same = {"CHECKPOINT_DIR": str(place / "checkpoints")}  # which is compared
    both = [made.start(host, folder, env | own | same, script=True) for host, (folder, own) in enumerate(zip(folders, paths, strict=True))]
    wait_for(both[0], lambda: b"\nstep:3/" in (folders[0] / "out").read_bytes())
    return both, folders


def said_within(folder: Path, words: str, seconds: float) -> bool:
    """Whether a line of train_gpt.py with these words comes in that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(line.startswith("train_gpt.py: ") and words in line for line in text(folder).splitlines()):
            return True
        time.sleep(0.2)
    return False


def cable_is_cut(made: Any, place: Path, env: dict[str, str]) -> tuple[int, int]:
    """Each host names what it misses within a minute, and ends within two."""
    import nodes

    both, folders = two_hosts(made, place, env)
    made.link("down")
    began = time.monotonic()
    named = [said_within(folders[0], "rank 2 of 4", 60), said_within(folders[1], "cannot be reached", max(1, began + 60 - time.monotonic()))]
    codes = nodes.wait_all(both, began + ENDED_S - time.monotonic())
    shown = f"cable cut: named {named}, exit codes {codes}, {time.monotonic() - began:.0f} s"
    print(shown, flush=True)
    return int(check([], shown, all(named) and all(code not in (0, None) for code in codes), text(folders[0]) + text(folders[1]))), 1


def host_is_frozen(made: Any, place: Path, env: dict[str, str]) -> tuple[int, int]:
    """SIGSTOP to all of the second host: the first names it within a minute and ends; running again, the second ends too."""
    import nodes

    both, folders = two_hosts(made, place, env)
    frozen, began = family(both[1].pid), time.monotonic()
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    named = said_within(folders[0], "rank 2 of 4", 60)
    codes = nodes.wait_all(both[:1], began + ENDED_S - time.monotonic())
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    codes += nodes.wait_all(both[1:], ENDED_S)
    shown = f"second host frozen: named {named}, exit codes {codes}, {time.monotonic() - began:.0f} s"
    print(shown, flush=True)
    return int(check([], shown, named and all(code not in (0, None) for code in codes), text(folders[0]) + text(folders[1]))), 1


# -------------------------------------------------------------------------------------------------- damaged inputs


def inputs(place: Path, data: Path, count: int | None, seed: int) -> Iterator[Row]:  # noqa: ARG001
    """bench/fuzz.py on every loader."""
    import fuzz_loaders

    place.mkdir(parents=True)
    for name in fuzz_loaders.TARGETS:
        words = [sys.executable, str(ROOT / "bench/fuzz.py"), name, "--seed", str(seed), "--cases", str(count or 100_000), "--seconds", "1e9",
                 "--folder", str(place)]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True)
        counts = {kind: int(number.replace(",", "")) for number, kind in re.findall(r"^ *([0-9,]+)  (.+)$", done.stdout, re.MULTILINE)}
        tried = counts.pop("cases", 0)
        bad = counts.pop("failures", 0) or int(done.returncode != 0)
        if bad:
            print(done.stdout[-3000:] + done.stderr[-1000:], flush=True)
        print(f"inputs: {name}: {tried:,}", flush=True)
        yield Row("inputs", name, tried - bad, tried, ", ".join(f"{kind} {number:,}" for kind, number in sorted(counts.items())))


# -------------------------------------------------------------------------------------------------- marked tests


def suite(place: Path, data: Path, count: int | None, seed: int) -> Iterator[Row]:  # noqa: ARG001
    """The tests that run_tests.sh leaves out; what is skipped for want of a tool is a row that says so."""
    words = [sys.executable, "-m", "pytest", "-m", "campaign", "-rs", "-p", "no:cacheprovider", f"--basetemp={place}", str(ROOT / "tests")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout[-200:])}
    bad = counts.get("failed", 0) + counts.get("error", 0) or int(done.returncode != 0)
    if bad:
        print(done.stdout[-3000:] + done.stderr[-1000:], flush=True)
    yield Row("suite", "marked tests", counts.get("passed", 0), counts.get("passed", 0) + bad, f"{counts.get('skipped', 0)} skipped")
    for number, why in sorted(set(re.findall(r"^SKIPPED \[(\d+)\] \S+: (.+)$", done.stdout, re.MULTILINE))):
        yield Row("suite", "not tried", 0, 0, f"{number}: {why}")


PARTS = {"kills": kills, "disk": disk, "ranks": ranks, "hosts": hosts, "inputs": inputs, "suite": suite}


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--count", type=int, help="of each part (default: 50 kills, 24 disks, 100,000 inputs a loader)")
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
