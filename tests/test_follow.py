"""Who follows a run: the bar on a terminal, by the real program in pseudo-terminals, and TRACK's programs, by their own libraries."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import follow
import pytest
import torch
from conftest import ROOT, environment, fresh_model, launch, on_processes, python, tiny_config, tokens

import train_gpt
from train_gpt import Follower, Phase, Tracking, TrainingStep, View, World, rounded_once

BAR = re.compile(r"([a-z -]+?)(?: +([0-9]+)%(?:\|(.*)\|)?)? ((?:[0-9]+:[0-9]{2})(?: left)?)(.*)")


class Screen:
    """What a terminal shows of what it is sent, of any number of rows: line ends, erasing, wrapping and, after a resize, wrapping anew."""

    def __init__(self, columns: int) -> None:
        self.columns, self.rows, self.row, self.column = columns, [""], 0, 0
        self.joined: set[int] = set()  # rows that go on the one before

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.down()
            elif part in ("\x1b[J", "\x1b[K"):
                self.rows[self.row] = self.rows[self.row][: self.column]
                if part == "\x1b[J":
                    del self.rows[self.row + 1 :]
                    self.joined = {row for row in self.joined if row <= self.row}
            else:
                assert not part.startswith("\x1b"), f"{part!r}: not known to this terminal"
                for character in part:
                    self.put(character)

    def down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    def put(self, character: str) -> None:
        if self.column == self.columns:
            self.down()
            self.column = 0
            self.joined.add(self.row)
        row = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = row[: self.column] + character + row[self.column + 1 :]
        self.column += 1

    def resize(self, columns: int) -> None:
        """As tmux, VTE and others do; the cursor stays with its character."""
        lines, cursor = [], (0, 0)
        for i, row in enumerate(self.rows):
            if i in self.joined:
                before = len(lines[-1])
                lines[-1] += row
            else:
                before = 0
                lines.append(row)
            if i == self.row:
                cursor = len(lines) - 1, before + self.column
        self.columns, self.rows, self.joined = columns, [], set()
        for i, line in enumerate(lines):
            start = len(self.rows)
            for at in range(0, max(1, len(line)), columns):
                self.joined |= {len(self.rows)} if at else set()
                self.rows.append(line[at : at + columns])
            if i == cursor[0]:
                self.row, self.column = start + cursor[1] // columns, cursor[1] % columns

    @property
    def bar(self) -> str:
        return self.rows[self.row].rstrip()

    @property
    def lines(self) -> list[str]:
        """Lines as they were written, whatever the width; without the one that the cursor is in."""
        found: list[str] = []
        for i, row in enumerate(self.rows[: self.row]):
            if i in self.joined:
                found[-1] += row
            else:
                found.append(row)
        return [line.rstrip() for line in found]


def test_the_screen_of_these_tests_is_a_terminal():
    screen = Screen(10)
    screen.feed("one\r\n0123456789ABC\r\nbar bar b\x1b[J\r")
    assert (
        screen.rows == ["one", "0123456789", "ABC", "bar bar b"]
        and screen.bar == "bar bar b"
        and screen.lines == ["one", "0123456789ABC"]
    )
    screen.resize(4)
    assert screen.lines == ["one", "0123456789ABC"] and screen.rows[-3:] == ["bar ", "bar ", "b"] and screen.bar == "bar"
    screen.feed("\rnew\x1b[J\r")
    assert screen.rows[-1] == "new" and screen.lines[-1] == "0123456789ABC"


def set_size(handle: int, columns: int) -> None:
    fcntl.ioctl(handle, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def on_terminal(
    command: list[str], env: dict[str, str], cwd: Path, columns: int, resize=None
) -> tuple[int, Screen, list[tuple[int, str]], float]:
    """(exit code, screen, every bar with the width it was drawn at, seconds) of a program in a pseudo-terminal. `resize` (bar -> columns
    or nothing): the width from then on."""
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")}
    ours, theirs = pty.openpty()
    set_size(theirs, columns)
    began = time.monotonic()
    child = subprocess.Popen(command, cwd=cwd, env=clean | {"TERM": "xterm", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"} | env,
                             stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)  # fmt: skip
    os.close(theirs)
    screen, bars, rest = Screen(columns), [], b""
    while time.monotonic() < began + 240:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux: all have closed it
            break
        text = (rest + data).decode(errors="ignore")
        rest = b""
        for part in re.split(r"(?<=\x1b\[J\r)", text):
            screen.feed(part)
            if part.endswith("\x1b[J\r") and screen.bar:
                bars.append((screen.columns, screen.bar))
        if resize and bars and (wanted := resize(bars[-1][1])) and wanted != screen.columns:
            screen.resize(wanted)
            set_size(ours, wanted)
            os.killpg(child.pid, signal.SIGWINCH)
    os.close(ours)
    if child.poll() is None:
        time.sleep(0.5)
        child.kill() if child.poll() is None else None
    return child.wait(), screen, bars, time.monotonic() - began


@pytest.fixture(scope="module")
def watched(data_dir, tmp_path_factory):
    """A run whose terminal has 80 columns, and 40 at the end of the training and of the last score."""
    folder = tmp_path_factory.mktemp("watched")
    env = environment(data_dir, run_id="w", iterations=60, val_loss_every=30, sliding_eval_stride=1, sliding_batch_size=2)

    def resize(bar: str) -> int:
        share = int(found[1]) if (found := re.search(r"(\d+)%", bar)) else 0
        return {"training": 40 if share >= 70 else 0, "sliding": 40 if share >= 20 else 80}.get(bar.split(" ")[0], 0)

    return folder, *on_terminal([python(), str(ROOT / "train_gpt.py")], env, folder, 80, resize)


def printed_lines(log: Path) -> list[str]:
    """The lines of a log that are printed, too."""
    lines = log.read_text().removeprefix((ROOT / "train_gpt.py").read_text()).splitlines()
    return [line for line in lines if line and not line.startswith("config {")]


def test_on_a_terminal_the_lines_stand_above_a_bar_that_vanishes(watched):
    folder, code, screen, _, _ = watched
    assert code == 0, screen.lines[-5:]
    assert screen.lines == [line.rstrip() for line in printed_lines(folder / "logs/w.txt")] and not screen.bar
    assert {"warmup:1/1", "step:10/60"} <= {line.partition(" ")[0] for line in screen.lines}


def test_the_bar_moves_through_the_phases_within_the_width(watched):
    *_, bars, _ = watched
    parsed = [(columns, bar, BAR.fullmatch(bar)) for columns, bar in bars]
    for columns, bar, found in parsed:
        assert found, f"{bar!r} is no bar: something is left over"
        assert len(bar) < columns, bar
    phases = list(dict.fromkeys(found[1] for *_, found in parsed))
    for name in ("setting up", "training", "sliding score"):
        assert name in phases, phases
    order = [
        "setting up",
        "warm-up",
        "temperature warm-up",
        "training",
        "validation",
        "temperature",
        "export",
        "score",
        "reading back",
        "chunked score",
        "sliding score",
    ]
    assert [name for name in order if name in phases] == [name for name in phases if name in order] == phases
    for name in ("training", "sliding score"):
        shares = [int(found[2]) for *_, found in parsed if found[1] == name and found[2]]
        assert shares == sorted(shares) and len(set(shares)) > 3 and all(0 <= share <= 100 for share in shares), shares
    assert {columns for columns, *_ in parsed} == {80, 40}


def test_while_it_trains_the_bar_has_the_figures_of_the_run(watched):
    folder, *_, bars, _ = watched
    training = [bar for columns, bar in bars if columns == 80 and bar.startswith("training") and "%" in bar]
    last = training[-1]
    losses = [float(x) for x in re.findall(r" loss:([\d.]+) t:", (folder / "logs/w.txt").read_text())]
    assert min(losses) - 0.1 < float(re.search(r"loss ([\d.]+)", last)[1]) < max(losses)
    elapsed = float(re.findall(r"train_time:(\d+)ms", (folder / "logs/w.txt").read_text())[-1]) / 1000
    assert float(re.search(r"([\d.]+)k tok/s", last)[1]) == pytest.approx(60 * 256 / elapsed / 1000, rel=0.6)
    assert re.search(r"lr [\d.]+", last) and " left" in last
    bpb = re.search(r"step:30/60 val_loss:\S+ val_bpb:(\S+)", (folder / "logs/w.txt").read_text())[1]
    assert f"val {bpb}" in last
    narrow = {name: [bar for columns, bar in bars if columns == 40 and bar.startswith(name) and "%" in bar] for name in ("training", "sliding")}
    assert all(narrow.values()), narrow
    assert all(re.fullmatch(r"sliding score +\d+%\|.{6,}\| \d+:\d\d left", bar) for bar in narrow["sliding"])
    for bar in narrow["training"][1:]:  # the first may be of the 80 columns before
        assert min(losses) - 0.1 < float(re.fullmatch(r"training \d+% \d+:\d\d left, loss (\d\.\d{3})", bar)[1]) < max(losses), (
            bar
        )


def test_where_no_terminal_is_lines_are_all_there_is(data_dir, tmp_path):
    done = launch(environment(data_dir, run_id="p") | {"TERM": "xterm"}, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == printed_lines(tmp_path / "logs/p.txt")
    assert "\r" not in done.stdout and "\x1b" not in done.stdout and done.stdout.splitlines()[-1].startswith("result {")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


PLAIN = {"a dumb terminal": {"TERM": "dumb"}, "none at all": {}, "a CI's": {"TERM": "xterm", "CI": "true"}}


@pytest.mark.parametrize("case", PLAIN)
def test_without_a_terminal_that_erases_nobody_follows(case, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert type(Follower.from_env(tiny_config(), World(), PLAIN[case])) is View
    assert type(Follower.from_env(tiny_config(), World(1, 2), {"TERM": "xterm"})) is View  # nor on another rank
    with Follower.from_env(tiny_config(), World(), {"TERM": "xterm", "CI": "0"}) as view:
        assert type(view) is Follower and view.meter
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert type(Follower.from_env(tiny_config(), World(), {"TERM": "xterm"})) is View


@pytest.mark.campaign
def test_on_two_processes_one_draws(data_dir, tmp_path):
    env = environment(data_dir, run_id="two", sliding_eval=0, iterations=30)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train_gpt.py")]
    code, screen, bars, seconds = on_terminal(torchrun, env, tmp_path, 80)
    assert code == 0, screen.lines[-9:]
    own = [line for line in screen.lines if re.match(r"warmup|step|budget|final|result", line)]
    assert own == [
        line for line in printed_lines(tmp_path / "logs/two.txt") if re.match(r"warmup|step|budget|final|result", line)
    ]
    assert 3 < len(bars) < seconds / 0.2 + 5  # of two there would be twice as many


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_in_tmux_nothing_is_left_of_the_bar_when_the_window_narrows(tmp_path):
    """A real terminal, which wraps lines anew; a program that draws as the trainer does."""
    (tmp_path / "draws.py").write_text(f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from conftest import tiny_config
from train_gpt import Follower, Log, World
cfg = tiny_config(log_dir={str(tmp_path / "logs")!r}, run_id="t")
with Follower.from_env(cfg, World(), {{"TERM": "xterm"}}) as view:
    log, done = Log(cfg, World(), view), view.phase("sliding score")
    for i in range(100000):
        done(min(.9, i / 100))
        time.sleep(.1)
        if i in (5, 40):
            log(f"line {{i}}")
        if {str(tmp_path / "stop")!r} and __import__("os").path.exists({str(tmp_path / "stop")!r}):
            break
log("the end")
time.sleep(60)
""")
    socket = f"test{os.getpid()}"
    tmux = lambda *words: (
        subprocess.run(
            ["tmux", "-L", socket, *words], capture_output=True, text=True, check=False, env=os.environ | {"LANG": "C.UTF-8"}
        ).stdout
    )

    def shown(wanted: str) -> list[str]:
        for _ in range(600):
            rows = [row.rstrip() for row in tmux("-u", "capture-pane", "-p", "-S", "-").splitlines() if row.strip()]
            if any(re.search(wanted, row) for row in rows):
                return rows
            time.sleep(0.1)
        raise AssertionError(f"no {wanted}: {rows}")

    tmux("-u", "-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "12", sys.executable, str(tmp_path / "draws.py"))
    try:
        rows = shown(r"line 5")
        rows = shown(r"sliding score +\d+%")
        assert rows[0] == "line 5" and len(rows) == 2 and len(rows[1]) > 60
        tmux("set-option", "-g", "window-size", "manual")
        tmux("resize-window", "-x", "40", "-y", "12")
        rows = shown(r"^line 40")
        rows = shown(r"sliding score +\d+%")
        assert rows[:2] == ["line 5", "line 40"] and len(rows) == 3 and len(rows[2]) < 40, rows
        (tmp_path / "stop").touch()
        assert shown("the end") == ["line 5", "line 40", "the end"]
    finally:
        tmux("kill-server")


# -------------------------------------------------------------------------------------------------- the line's words


def training_phase(monkeypatch, seconds: float, progress: float, peak: float = 0.0) -> Phase:
    """A training that began `seconds` ago, at 2.5 million tokens a second."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    loop = SimpleNamespace(progress=0.0, report=SimpleNamespace(loss=math.nan), position=0)
    loop.batches = SimpleNamespace(state=lambda: {"position": loop.position})
    loop.clock = SimpleNamespace(elapsed=lambda: now[0] - 100)
    step = SimpleNamespace(optimizers=[SimpleNamespace(group={"lr": 0.0123})], model=fresh_model(tiny_config()))
    phase = Phase("training", peak, loop, step)
    assert re.fullmatch(r"training 0:00", phase.text(79, "", None))
    loop.progress, loop.report.loss = 1e-9, 3.0
    phase.text(79, "", None)
    now[0] += seconds
    loop.progress, loop.position, loop.report.loss = progress, int(2.5e6 * seconds), 2.0
    return phase


def test_time_left_loss_and_rate_are_what_the_loop_has(monkeypatch):
    text = training_phase(monkeypatch, 30, 0.25).text(79, "1.2345", None)
    assert text == "training 25% 1:30 left, loss 2.500, 2.50M tok/s, val 1.2345, lr 0.012"


def test_time_left_runs_down_while_a_part_takes_long(monkeypatch):
    """Of four parts of 30 s; the second takes 100."""
    now = [5.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    phase = Phase("score", 0)
    now[0] += 30
    phase.done(0.25)
    for seconds, said in ((0, "1:30"), (10, "1:20"), (29, "1:01"), (95, "0:00")):
        now[0] = 35 + seconds
        assert phase.text(79, "", None) == f"score 25% {said} left"
    now[0] = 135
    phase.done(0.5)
    assert phase.text(79, "", None) == "score 50% 2:10 left"


def test_what_does_not_fit_is_left_out_the_least_telling_first(monkeypatch):
    from tqdm import tqdm

    phase, widths = training_phase(monkeypatch, 30, 0.25), {}
    for columns in range(20, 120):
        text = phase.text(columns, "1.2345", tqdm.format_meter)
        assert len(text) <= columns
        widths[columns] = len(text.split(", "))
    assert sorted(widths.values()) == list(widths.values()) and (widths[29], widths[40], widths[69], widths[79]) == (1, 2, 4, 5)
    phase.loss = phase.loop.report.loss = 2.5
    assert re.search(r"\|.{6,}\| 1:30 left, loss 2.500$", phase.text(44, "1.2345", tqdm.format_meter))
    narrow = {43: "training 25% 1:30 left, loss 2.500", 35: "training 25% 1:30 left, loss 2.500", 34: "training 1:30 left, loss 2.500",
              30: "training 1:30 left, loss 2.500", 29: "training 1:30 left", 18: "training 1:30 left", 12: "training 1:3"}  # fmt: skip
    assert {columns: phase.text(columns, "1.2345", tqdm.format_meter) for columns in narrow} == narrow
    phase.name, phase.loop = "sliding score", None
    assert [phase.text(columns, "", tqdm.format_meter) for columns in (36, 22)] == [
        "sliding score 25% 1:30 left",
        "sliding score 1:30 lef",
    ]
    assert re.fullmatch(r"sliding score +25%\|.{6,}\| 1:30 left", phase.text(37, "", tqdm.format_meter))


def test_the_share_of_the_peak_is_that_of_the_models_flops(monkeypatch):
    import step_worker

    for settings in ({}, {"train_seq_len": 64, "yarn_max_len": 64}, {"embed_dim": 0}):
        model = train_gpt.GPT(tiny_config(**settings))
        assert train_gpt.flops_a_token(model) == pytest.approx(
            sum(step_worker.flops_a_token(model, torch.device("cpu")).values())
        )
    assert train_gpt.flops_a_token(train_gpt.GPT(tiny_config(training_depth_recurrence=2))) == 0
    a_token = train_gpt.flops_a_token(fresh_model(tiny_config()))
    assert "50% of peak" in training_phase(monkeypatch, 30, 0.25, peak=2.5e6 * a_token * 2).text(100, "", None)


def test_a_validation_gives_way_to_the_training_that_it_interrupted(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Follower.from_env(tiny_config(), World(), {"TERM": "xterm"}) as view:
        phase = training_phase(monkeypatch, 30, 0.25)
        view.now = phase
        done = view.phase("validation")
        for share, name in ((0.5, "validation"), (1.0, "training")):
            done(share)
            sys.stderr.truncate(0)
            deadline = time.monotonic() + 20
            while name not in sys.stderr.getvalue() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert name in sys.stderr.getvalue()


# -------------------------------------------------------------------------------------------------- TRACK

INSTALLED = [name for name in train_gpt.TRACKERS if __import__("importlib.util").util.find_spec(name)]
needs = lambda name: pytest.mark.skipif(name not in INSTALLED, reason=f"needs {name} (requirements-extra.txt)")


@pytest.fixture(scope="module")
def tracked(data_dir, tmp_path_factory):
    """(folder, result, {step: figures of the log's lines}) of a run that all installed programs follow."""
    if not INSTALLED:
        pytest.skip("needs tensorboard, wandb or trackio (requirements-extra.txt)")
    folder = tmp_path_factory.mktemp("tracked")
    done = launch(
        environment(data_dir, run_id="t", train_log_every=8, val_loss_every=8, track=",".join(INSTALLED)), folder, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == printed_lines(folder / "logs/t.txt")  # no library prints there
    assert "warning: TRACK" not in done.stdout
    return folder, json.loads(done.stdout.splitlines()[-1][7:]), done.stdout


def expected_of(result: dict, out: str) -> dict[str, dict[int, float]]:
    """{figure: {step: value}} as the lines of the log have it."""
    losses = {int(step): float(loss) for step, loss in re.findall(r"^step:(\d+)/24 loss:([\d.]+)", out, re.M)}
    found = {"loss": losses}
    for name in ("loss", "bpb"):
        found[f"val/{name}"] = {
            int(s): float(x)
            for s, x in re.findall(
                rf"^step:(\d+)/24 val_loss:.*?val_{name}:([\d.]+)" if name == "bpb" else r"^step:(\d+)/24 val_loss:([\d.]+)",
                out,
                re.M,
            )
        }
    found |= {f"result/{key}": {24: float(x)} for key, x in result.items() if isinstance(x, (int, float))}
    return found


def check_figures(sent: dict[str, dict[int, float]], tracked) -> None:
    """What a program has is what the log says; zeros of the matrices add up to the run's own figure, and churn is some of the codes."""
    folder, result, out = tracked
    for name, points in expected_of(result, out).items():
        assert sent[name].keys() == points.keys(), name
        assert all(sent[name][step] == pytest.approx(value, rel=1e-5, abs=6e-5) for step, value in points.items()), name
    model = fresh_model(tiny_config())
    sizes = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, train_gpt.TernaryLinear)}
    zeros = sum(sent[f"zero_frac/{name}"][24] * size for name, size in sizes.items()) / sum(sizes.values())
    assert zeros == pytest.approx(result["zero_frac"], abs=1e-6)
    for name in sizes:
        assert all(0 <= x < 1 for x in sent[f"churn/{name}"].values()) and max(sent[f"churn/{name}"].values()) > 0
        assert all(x > 0 for x in sent[f"scale/{name}"].values())
        assert {f"gradient_norm/{name}", f"weight_norm/{name}"} <= sent.keys()
    assert sent["lr/matrix_lr"][1] == pytest.approx(0.04) and sent["lr/matrix_lr"][24] < 0.02 and "lr/scalar_lr" in sent
    assert sent["tokens_per_s"][24] > 0 and sent["memory_bytes"][24] > 1e7


@needs("tensorboard")
def test_tensorboard_reads_the_run(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tracked[0] / "logs/tensorboard").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    check_figures({name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}, tracked)
    (config,) = events.Tensors("config/text_summary")
    assert json.loads(config.tensor_proto.string_val[0])["num_layers"] == 3


def records_of(path: Path) -> list[bytes]:
    """Records of wandb's file: after 7 bytes, blocks of 32 KiB with parts that have checksum, length and type (LevelDB's log format)."""
    data, at, found, parts = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            found.append(parts)
            parts = b""
    return found


@needs("wandb")
def test_wandb_has_the_run_in_its_offline_file(tracked):
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (tracked[0] / "logs/wandb").glob("offline-run-*/*.wandb")
    sent, config = {}, {}
    for data in records_of(path):
        record = Record()
        record.ParseFromString(data)
        items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for name, value in items.items():
            sent.setdefault(name, {})[items["_step"]] = value
        config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    check_figures(sent, tracked)
    assert config["num_layers"] == 3


READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("train_gpt")
print(json.dumps([SQLiteStorage.get_logs("train_gpt", run), SQLiteStorage.get_run_config("train_gpt", run)]))
"""


@needs("trackio")
def test_trackio_has_the_run_in_its_database(tracked):
    env = os.environ | {"TRACKIO_DIR": str(tracked[0] / "logs/trackio")}
    done = subprocess.run([sys.executable, "-c", READ_TRACKIO], env=env, capture_output=True, text=True, check=True)
    logs, config = json.loads(done.stdout.splitlines()[-1])
    sent: dict[str, dict[int, float]] = {}
    for entry in logs:
        for name, value in entry.items():
            sent.setdefault(name, {})[entry["step"]] = value
    check_figures(sent, tracked)
    assert config["num_layers"] == 3


class Recorder:
    """A program of TRACK that keeps what it is sent; `fails_at`: the call that raises."""

    def __init__(self, fails_at: int = 0) -> None:
        self.names, self.sent, self.closed, self.calls, self.fails_at = [], {}, 0, 0, fails_at

    def __call__(self, *_):
        def start(name, settings):
            self.names.append(name)
            assert settings["num_layers"] == 3
            print("printed by a library")
            return self.send, self.close

        return start

    def send(self, step, figures):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the disk\nis full")
        for name, value in figures.items():
            self.sent.setdefault(name, {})[step] = value

    def close(self):
        self.closed += 1


def test_what_a_program_raises_ends_that_program_alone(data_dir, tmp_path, run_here, monkeypatch):
    good, bad = Recorder(), Recorder(fails_at=3)
    monkeypatch.setattr(train_gpt, "TRACKERS", {"tensorboard": good, "wandb": bad})
    code, out, err = run_here(environment(data_dir, run_id="r", sliding_eval=0, track="wandb,tensorboard"))
    assert code == 0 and not err and "printed by" not in out
    warning = "warning: TRACK=wandb: RuntimeError: the disk; it is off from here on, the run goes on"
    assert (
        out.count("warning: TRACK") == 1
        and warning in out.splitlines()
        and warning in (tmp_path / "logs/r.txt").read_text().splitlines()
    )
    assert bad.calls == 3 and good.closed == 1 and good.sent["result/steps"] == {24: 24.0}
    assert list(good.sent["loss"]) == [1, 2, 3, 4, 5, 10, 20]


def test_the_programs_follow_a_run_that_goes_on_as_the_same(data_dir, tmp_path, run_here, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(train_gpt, "TRACKERS", {"tensorboard": recorder})
    settings = {"sliding_eval": 0, "track": "tensorboard", "checkpoint_every": 8, "train_log_every": 4}
    assert run_here(environment(data_dir, run_id="first", **settings))[0] == 0
    (tmp_path / "checkpoints/first_00000024.ckpt").unlink(missing_ok=True)
    recorder.sent.clear()
    code, out, err = run_here(environment(data_dir, run_id="second", resume=1, **settings))
    assert code == 0 and "resumed step:16" in out, err
    assert recorder.names[0] == recorder.names[1] and re.fullmatch("first_[0-9a-f]{8}", recorder.names[0])
    assert list(recorder.sent["loss"]) == [20, 24]
    assert run_here(environment(data_dir, run_id="first", **settings))[0] == 0 and len(set(recorder.names)) == 2


@pytest.mark.parametrize("name", train_gpt.TRACKERS)
def test_a_program_that_is_not_installed_is_refused_at_once(name, data_dir, tmp_path, run_here, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == name or m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/r.txt").write_text("earlier")
    code, out, err = run_here(environment(data_dir, run_id="r", track=name))
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith(f"train_gpt.py: TRACK={name!r}: expected the package {name} (pip install {name}): ")
    assert (tmp_path / "logs/r.txt").read_text() == "earlier" and len(list((tmp_path / "logs").iterdir())) == 1


def test_an_evaluation_is_tracked_too(data_dir, run_here, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(train_gpt, "TRACKERS", {"tensorboard": recorder})
    assert run_here(environment(data_dir, iterations=2, sliding_eval=0))[0] == 0 and not recorder.names
    scoring = {
        "DATA_PATH": str(data_dir),
        "TOKENIZER_PATH": str(data_dir / "tokenizer.model"),
        "EVAL_ONLY": "1",
        "SLIDING_EVAL": "0",
    }
    assert run_here(scoring | {"TRACK": "tensorboard"})[0] == 0
    assert recorder.closed == 1 and recorder.sent["result/roundtrip_val_bpb"].keys() == {0}


def figures_after(world: World, steps: int = 3, **settings: object) -> tuple[TrainingStep, dict[str, float]]:
    """A step's figures after some steps on random tokens, the same on any number of processes."""
    cfg = tiny_config(**settings)
    torch.manual_seed(0)
    model, sent = fresh_model(cfg), []
    view = View()
    view.track = lambda log, step, figures: sent.append(figures)  # noqa: ARG005
    loop = SimpleNamespace(step=0, log=SimpleNamespace(view=view), batches=SimpleNamespace(state=lambda: {"position": 0}),
                           clock=train_gpt.Clock(world), report=SimpleNamespace(logged=0, loss=0.0))  # fmt: skip
    with rounded_once(model):
        step = TrainingStep(model, cfg, world)
        hook = Tracking(step)
        hook.begin(loop)
        for i in range(steps):
            x = tokens(model, 8, seed=i).chunk(world.size)[world.rank]
            step.take(x, x.roll(-1, 1))
            loop.report.logged = i + 1
            hook.after_step(i, 0.0)
        step.share_latent()
    return step, sent[-1]


def test_norms_are_those_of_the_parameters_and_their_gradients():
    step, figures = figures_after(World())
    squares = {"weight": 0.0, "gradient": 0.0}
    modules = dict(step.model.named_modules())
    for name, p in step.model.named_parameters():
        own = name.removesuffix(".weight") if f"weight_norm/{name}" not in figures else name
        assert own == name or isinstance(modules[own], train_gpt.QuantizedLinear)
        for kind, x in (("weight", p), ("gradient", p.grad)):
            norm = math.sqrt(sum(v * v for v in x.detach().double().flatten().tolist()))
            assert figures[f"{kind}_norm/{own}"] == pytest.approx(norm, rel=1e-4, abs=1e-12)
            squares[kind] += norm**2
    for kind, square in squares.items():
        assert figures[f"{kind}_norm"] == pytest.approx(math.sqrt(square), rel=1e-4)


def norms_on_processes(world: World) -> dict[str, float]:
    return figures_after(world)[1]


def test_norms_over_two_processes_are_those_of_one(tmp_path):
    """Each owns half of the matrices and sees half of the tokens."""
    (two,), one = on_processes(2, tmp_path, "test_follow.norms_on_processes"), figures_after(World())[1]
    changing = {"train_time_s", "memory_bytes", "tokens_per_s"}
    assert two.keys() == one.keys()
    for name in one.keys() - changing:
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


def test_when_off_nothing_is_done(data_dir, tmp_path, monkeypatch):
    """Neither hook nor thread, and the loop tells nobody."""
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(data_path=data_dir, iterations=2)
    step = TrainingStep(fresh_model(cfg), cfg, World())
    assert not step.hooks and View().phase("training") is train_gpt.nothing
    with contextlib.redirect_stderr(io.StringIO()):
        assert type(Follower.from_env(cfg, World(), {"TERM": "xterm"})) is View


# -------------------------------------------------------------------------------------------------- bench/follow.py


def test_what_following_costs_is_compared_within_a_round():
    """The second round met other work, which lengthens both of its steps by a half: their ratio stays."""
    off = [follow.Cost(0.1, 0.2, 60.0, 1.0, 9), follow.Cost(0.1, 0.2, 90.0, 1.0, 9), follow.Cost(0.2, 0.3, 60.0, 1.0, 9)]
    costs = [follow.Cost(0.4, 0.5, 63.0, 7.0, 9), follow.Cost(0.5, 3.0, 94.5, 9.0, 9), follow.Cost(0.3, 0.6, 60.0, 7.0, 9)]
    assert follow.medians(costs, off) == pytest.approx((0.4, 0.6, 1.05))


def test_a_round_counts_each_step_and_its_pause():
    cost = follow.measure("", shows=True, layers=1, seconds=1.0, step_s=0.02)
    assert follow.SETTLED < cost.steps <= follow.SETTLED + 51 and cost.step >= 20 and 0 < cost.clock < cost.step - 20 + 1e-6
    assert cost.most >= cost.clock and 0 < cost.processor < cost.step


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--seconds", "-1"]])
def test_mistakes_of_the_bench_are_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["follow.py", *arguments])
    with pytest.raises(SystemExit) as end:
        follow.main()
    assert end.value.code == 2 and f"{arguments[0]} {arguments[1]}" in (said := capsys.readouterr().err) and said.count("\n") == 1
