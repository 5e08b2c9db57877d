"""tools/plot_logs.py: a curve of a log, and the picture of several."""

from __future__ import annotations

import re
import sys

import plot_logs
import pytest
from conftest import ROOT

LOG = """step:{self.n} loss: no number here
step:1/9 loss:8.0000 t:500ms avg:500.0ms
step:2/9 loss:6.0000 t:1000ms avg:500.0ms
step:3/9 loss:5.0000 t:1500ms avg:500.0ms
step:9/9 val_loss:4.0000 val_bpb:2.5000 train_time:4500ms zero_frac:0.333
"""


def test_a_curve_is_read_and_drawn(tmp_path):
    from matplotlib.figure import Figure

    for name, text in (("a_seed7", LOG), ("a_seed42", LOG.replace("2.5", "2.7")), ("b", LOG.replace("2.5", "1.5"))):
        (tmp_path / f"{name}.txt").write_text(text)
    curves = [plot_logs.read_curve(path) for path in sorted(tmp_path.iterdir())]
    assert curves[0] == ("a", [(1, 0.5, 8.0), (2, 1.0, 6.0), (3, 1.5, 5.0)], [(9, 4.5, 4.0, 2.7)])
    axes = Figure().subplots()
    plot_logs.draw(axes, curves, plot_logs.parse_arguments(["x", "--out", "y.png", "--smooth", "1"]))
    lines, dots = axes.get_lines()[::2], axes.get_lines()[1::2]
    assert [line.get_label() for line in lines if line.get_label()[0] != "_"] == ["b  1.500", "a  2.600"]  # the best first
    assert lines[0].get_xdata().tolist() == [0.5, 1.0, 1.5] and lines[0].get_ydata().tolist() == [8, 6, 5]
    assert {(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots} == {(4.5, 4)}
    low, high = axes.get_ylim()
    assert low < 4 and high > 8


def test_smoothing_follows_the_steep_beginning():
    values = [8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 1.0]
    assert plot_logs.running_mean(values, 2) == [8, 6, 5, 4, 3.5, 2.5, 2, 2, 1.5]


def plot(folder, *arguments):
    """Exit code of plot_logs with a picture in the folder."""
    try:
        return plot_logs.main([*map(str, arguments), "--out", str(folder / "picture.png")])
    except SystemExit as end:
        return end.code


def test_the_picture_is_written(tmp_path):
    (tmp_path / "run_seed7.txt").write_text(LOG)
    assert plot(tmp_path, tmp_path / "run_seed7.txt", "--value", "val_bpb", "--against", "steps") == 0
    assert re.match(rb"\x89PNG\r\n", (tmp_path / "picture.png").read_bytes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["picture.png", "run_seed7.txt"]


NO_LOGS = {
    "other text": (b"nothing\n", "no line `step:N/M loss:L t:Tms`"),
    "empty": (b"", "no line `step:N/M loss:L t:Tms`"),
    "not text": (b"\xff\xfe\x00", "not a text file"),
    "numbers that are none": (b"step:1/9 loss:1.2.3 t:5ms\nstep:2/9 loss:nan t:5ms\n", "no line `step:N/M loss:L t:Tms`"),
    "two runs in one": (b"config {}\n" + LOG.encode() + b"config {}\n" + LOG.encode(), "the logs of 2 runs in one file"),
}


@pytest.mark.parametrize("case", NO_LOGS)
def test_a_file_that_is_no_training_log_is_named_and_left_out(case, tmp_path, capsys):
    content, said = NO_LOGS[case]
    log, other = tmp_path / "run.txt", tmp_path / "other.txt"
    log.write_text(LOG)
    other.write_bytes(content)
    assert plot(tmp_path, other, log, tmp_path) == 0 and (tmp_path / "picture.png").exists()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"plot_logs.py: left out: {other}: {said}") and second == f"plot_logs.py: left out: {tmp_path}: is a folder"
    (tmp_path / "picture.png").unlink()
    assert plot(tmp_path, other, other) == 2 and not (tmp_path / "picture.png").exists()
    assert capsys.readouterr().err.splitlines()[-1] == f"plot_logs.py: error: {other}, {other}: no log of a training run"


def test_the_logs_of_a_fresh_clone_are_drawn(tmp_path, capsys):
    """`logs/*.txt`, as README has it: measurements of other kinds lie there too."""
    tracked = sorted(ROOT.glob("logs/R[0-9]*.txt"))
    assert plot(tmp_path, *tracked) == 0
    said = capsys.readouterr().err
    assert "R002_demo_sweep.txt" in said and "R014_demo.txt" not in said and 0 < said.count("left out") < len(tracked)


@pytest.mark.parametrize("arguments, said", [
    (["missing.txt", "run.txt"], "missing.txt: No such file or directory"),
    (["run.txt", "--smooth", "0"], "--smooth 0: expected 1 to 10000"),
    (["run.txt", "--smooth", "1e3"], "--smooth: invalid int value"),
    (["run.txt", "--smooth", "99999999999"], "--smooth 99999999999: expected 1 to 10000"),
    (["run.txt", "--out", "picture.xyz"], "--out picture.xyz: expected a name that ends in .png"),
    (["run.txt", "--out", "no/picture.png"], "--out no/picture.png: there is no folder no"),
    (["run.txt", "--title", "two\nlines"], "expected one line of text"),
    (["run.txt", "--value", "val_bpb", "--foo"], "unrecognized arguments: --foo"),
    ([], "LOG"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.txt").write_text(LOG)
    with pytest.raises(SystemExit) as end:
        sys.exit(plot_logs.main(["--out", "picture.png", *arguments]))
    complaint = capsys.readouterr().err
    assert end.value.code == 2 and said in complaint and complaint.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run.txt"]


def test_names_and_titles_are_no_formulas_and_none_is_left_out_of_the_legend(tmp_path, monkeypatch):
    """Two dollars are a formula to matplotlib, which may not parse; a label that begins with "_" is left out of its legends."""
    from matplotlib.legend import Legend

    shown = []
    monkeypatch.setattr(Legend, "get_texts", lambda legend: shown.extend(legend.texts) or legend.texts)
    for name in ("_preset__seed7", "a$_^$", "caf\udce9"):
        (tmp_path / f"{name}.txt").write_text(LOG)
    assert plot(tmp_path, *tmp_path.glob("*.txt"), "--title", "costs $5 or $\\frac$") == 0
    assert sorted(text.get_text() for text in shown) == ["a$_^$  2.500", "caf?  2.500", "preset_  2.500"]


def test_without_matplotlib_the_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot_logs.importlib.util, "find_spec", lambda _: None)
    assert plot(tmp_path, "run.txt") == 2
    assert capsys.readouterr().err == (
        "plot_logs.py: error: needs matplotlib, which is not installed: bash setup.sh --tests, or pip install matplotlib\n"
    )


def test_a_failed_write_leaves_the_picture_before(tmp_path, monkeypatch, capsys):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "picture.png").write_text("the one before")
    (tmp_path / "run.txt").write_text(LOG)
    monkeypatch.setattr(plot_logs.os, "replace", no_space)
    assert plot(tmp_path, tmp_path / "run.txt") == 2 and "No space left" in capsys.readouterr().err
    assert (tmp_path / "picture.png").read_text() == "the one before" and len(list(tmp_path.iterdir())) == 2
