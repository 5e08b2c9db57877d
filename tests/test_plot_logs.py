"""tools/plot_logs.py: a curve of a log, and the picture of several."""

from __future__ import annotations

import re

import plot_logs

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
    plot_logs.draw(axes, curves, plot_logs.parse_arguments(["x", "--out", "y", "--smooth", "1"]))
    lines, dots = axes.get_lines()[::2], axes.get_lines()[1::2]
    assert [line.get_label() for line in lines if line.get_label()[0] != "_"] == ["b  1.500", "a  2.600"]  # the best first
    assert lines[0].get_xdata().tolist() == [0.5, 1.0, 1.5] and lines[0].get_ydata().tolist() == [8, 6, 5]
    assert {(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots} == {(4.5, 4)}
    low, high = axes.get_ylim()
    assert low < 4 and high > 8


def test_smoothing_follows_the_steep_beginning():
    values = [8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 1.0]
    assert plot_logs.running_mean(values, 2) == [8, 6, 5, 4, 3.5, 2.5, 2, 2, 1.5]


def test_the_picture_is_written_and_a_file_that_is_no_log_is_refused_in_one_line(tmp_path, capsys):
    log, other = tmp_path / "run_seed7.txt", tmp_path / "other.txt"
    log.write_text(LOG)
    other.write_text("nothing\n")
    assert plot_logs.main([str(log), "--out", str(tmp_path / "a.png"), "--value", "val_bpb", "--against", "steps"]) == 0
    assert re.match(rb"\x89PNG\r\n", (tmp_path / "a.png").read_bytes())
    assert plot_logs.main([str(log), str(other), "--out", str(tmp_path / "b.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "b.png").exists()
