"""tools/plot_logs.py: a curve of a log, and the picture of several."""

from __future__ import annotations

import json
import re
import sys
from xml.etree import ElementTree

import plot_logs
import pytest
from conftest import ROOT, TINY, launch

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
    assert curves[0][:3] == ("a", [(1, 0.5, 8.0), (2, 1.0, 6.0), (3, 1.5, 5.0)], [(9, 4.5, 4.0, 2.7)])
    axes = Figure().subplots()
    plot_logs.draw(axes, curves, plot_logs.parse_arguments(["x", "--out", "y.png", "--smooth", "1"]))
    lines, dots = axes.get_lines()[::2], axes.get_lines()[1::2]
    assert (
        len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 2
    )  # a and b, whatever their colours
    assert [line.get_label() for line in lines if line.get_label()[0] != "_"] == ["b  1.500", "a  2.600"]  # the best first
    assert lines[0].get_xdata().tolist() == [0.5, 1.0, 1.5] and lines[0].get_ydata().tolist() == [8, 6, 5]
    assert {(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots} == {(4.5, 4)}
    low, high = axes.get_ylim()
    assert low < 4 and high > 8 and axes.get_xlim()[1] > 4.5  # the validation is later than the last line of the training


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
    assert (
        first.startswith(f"plot_logs.py: left out: {other}: {said}")
        and second == f"plot_logs.py: left out: {tmp_path}: is a folder"
    )
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
    (["run.txt", "--artifact", "a.ptz"], "--artifact a.ptz: belongs to --value zero_fraction and --value overview"),
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


# -------------------------------------------------------------------------------------------------- what a log implies

SETTINGS = {"matrix_lr": 0.04, "max_wallclock_seconds": 0.0, "iterations": 100, "warmdown_fraction": 0.5, "train_batch_tokens": 256,
            "train_seq_len": 32}  # fmt: skip
RESULT = {"stream_bytes": {"trits": 100, "scales": 20, "tables": 300, "controls": 30}, "artifact_bytes": 500}


def run_log(steps=100, settings=(), result=(), extra=""):
    """A log of as many steps, a tenth of a second each."""
    lines = "".join(f"step:{n}/100 loss:{8 - n / 50:.4f} t:{100 * n}ms avg:100.0ms\n" for n in range(1, steps + 1))
    end = f"step:{steps}/100 val_loss:4.0000 val_bpb:2.5000 train_time:{100 * steps}ms zero_frac:0.320\n"
    return f"config {json.dumps(SETTINGS | dict(settings))}\n{lines}{extra}{end}result {json.dumps(RESULT | dict(result))}\n"


def curve_of(tmp_path, **about):
    (tmp_path / "run.txt").write_text(run_log(**about))
    return plot_logs.read_curve(tmp_path / "run.txt")


def test_the_learning_rate_is_the_schedules(tmp_path):
    """Constant over the first half, then linear to 0: by steps, and by a clock that ends after 4 s, of 5 allowed."""
    rate = plot_logs.rate_at(curve_of(tmp_path))
    assert [rate(step, step / 10) for step in (1, 50, 76, 100)] == pytest.approx([0.04, 0.04, 0.02, 0.0008])
    x, y = plot_logs.points(curve_of(tmp_path), "steps", "learning_rate", 1)
    assert (x[0], x[-1]) == (1, 100) and y[-1] == pytest.approx(0.0008)
    clock = {"max_wallclock_seconds": 5.0, "iterations": 10_000}
    rate = plot_logs.rate_at(
        curve_of(tmp_path, steps=40, settings=clock.items(), result={"steps": 40, "ms_per_step": 100.0}.items())
    )
    assert [rate(step, step / 10) for step in (20, 31)] == pytest.approx([0.04, 0.02])


def test_tokens_are_those_of_the_batches(tmp_path):
    """A constant batch, and one that is a half until a quarter of the run is over, as train_gpt.py takes its steps."""
    assert plot_logs.points(curve_of(tmp_path), "tokens", "loss", 1)[0][-1] == 100 * 256 / 1e6
    growing = curve_of(tmp_path, settings={"batch_tokens_start": 128, "batch_schedule_fraction": 0.25}.items())
    tokens = plot_logs.tokens_at(growing)
    assert [tokens(step, 0) for step in (1, 25, 26, 100)] == [128, 25 * 128, 25 * 128 + 256, 25 * 128 + 75 * 256]


def test_a_growing_batch_has_the_tokens_of_a_real_run_and_its_artifact_the_zeros(data_dir, tmp_path, capsys):
    ramp = {"BATCH_RAMP_START": "64", "BATCH_RAMP_FRAC": "0.5", "TRAIN_LOG_EVERY": "1", "RUN_ID": "r", "TEMP_SCALING": "0"}
    data = {"DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(data_dir / "tokenizer.model")}
    done = launch(TINY | ramp | data | {"SLIDING_EVAL": "0", "CHURN_LOG_EVERY": "6", "VAL_LOSS_EVERY": "10"}, tmp_path)
    assert done.returncode == 0, done.stderr
    curve = plot_logs.read_curve(tmp_path / "logs/r.txt")
    assert plot_logs.tokens_at(curve)(24, 0) == curve.result["tokens"] < 24 * 256
    assert sorted({step for step, *_ in curve.zeros}) == [6, 12, 18, 24] and len(curve.validation) == 3
    assert curve.zeros[-1][1] == pytest.approx(curve.result["zero_frac"], abs=1e-3)
    sizes = plot_logs.stream_bytes(curve)
    assert sum(sizes.values()) == curve.result["artifact_bytes"] and list(sizes) == [*plot_logs.STREAMS, "header"]
    zeros_by_layer_are_the_runs(tmp_path, curve, capsys)


def zeros_by_layer_are_the_runs(folder, curve, capsys):
    """The trained model's total, which the program counted in training, is the drawn shares' mean over the weights of their matrices,
    whose sizes are written out here; a matrix's own share is the one that inspect_artifact.py's table has."""
    import inspect_artifact
    from matplotlib.figure import Figure

    artifact = folder / "final_model.ternary.ptz"
    kinds, axes = plot_logs.zeros_by_layer(artifact, [curve]), Figure().subplots()
    plot_logs.draw_layers(axes, kinds, artifact.name)
    cfg = curve.config
    width, heads = cfg["model_dim"], cfg["model_dim"] // cfg["num_heads"]
    sizes = {"attention.qkv": width * (width + 2 * heads * cfg["num_kv_heads"]), "attention.out": width * width,
             "mlp.up": width * width * cfg["mlp_mult"], "mlp.down": width * width * cfg["mlp_mult"]}  # fmt: skip
    drawn = {line.get_label(): line for line in axes.get_lines()}
    assert drawn.keys() == sizes.keys() and all(line.get_xdata().tolist() == [0, 1, 2] for line in drawn.values())
    zeros = sum(sizes[kind] * share / 100 for kind, line in drawn.items() for share in line.get_ydata())
    assert zeros / (3 * sum(sizes.values())) == pytest.approx(curve.result["zero_frac"], abs=1e-6)
    assert len({(line.get_linestyle(), line.get_marker()) for line in drawn.values()}) == len(drawn)  # told apart in grey
    low, high = axes.get_ylim()
    assert all(low < share < high for line in drawn.values() for share in line.get_ydata())
    capsys.readouterr()
    assert inspect_artifact.main([str(artifact)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("blocks.1.mlp.down.weight ")]
    assert f" {drawn['mlp.down'].get_ydata()[1]:.1f} % " in row

    log = folder / "logs/r.txt"
    for value, name in (("zero_fraction", "p.svg"), ("overview", "p.svg"), ("overview", "p.png")):
        out = folder / name
        assert plot_logs.main([str(log), "--value", value, "--artifact", str(artifact), "--out", str(out)]) == 0
        if name.endswith("svg"):
            assert {"zeros of each matrix (%)", "layer of final_model.ternary.ptz (0: the first)", "attention.out"} <= texts_of(
                out
            )
    (folder / "other.ptz").write_bytes(artifact.read_bytes()[:-1])
    other = folder / "other.txt"
    other.write_text(LOG)
    for arguments, said in (([log, "--artifact", folder / "other.ptz"], f"{folder / 'other.ptz'}: "),
                            ([other, "--artifact", artifact], f"--artifact {artifact}: its SHA-256 is "),
                            ([log, "--artifact", folder / "none.ptz"], "none.ptz: No such file or directory; expected an artifact")):  # fmt: skip
        assert plot(folder, *arguments, "--value", "overview") == 2 and not (folder / "picture.png").exists()
        complaint = capsys.readouterr().err
        assert complaint.startswith("plot_logs.py: error: ") and said in complaint and complaint.count("\n") == 1


def texts_of(svg):
    """What is written in a picture."""
    return {"".join(text.itertext()) for text in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")}


def test_zeros_stand_at_the_time_of_their_step(tmp_path):
    curve = curve_of(tmp_path, extra="churn:0.1000 zero_frac:0.3000 step:50/100\n")
    assert plot_logs.points(curve, "time", "zero_fraction", 1) == ([5.0, 10.0], [30.0, 32.0])


@pytest.mark.parametrize(("value", "name"), [("overview", "p.png"), ("bytes", "p.svg"), ("learning_rate", "p.svg"), ("zero_fraction", "p.png"),
                                             ("effects", "p.svg")])  # fmt: skip
def test_every_value_is_a_picture_and_the_same_one_again(value, name, tmp_path):
    (tmp_path / "run.txt").write_text(run_log())
    logs = ROOT / "logs/R016_recipe_p1.txt" if value == "effects" else tmp_path / "run.txt"
    pictures = []
    for _ in range(2):
        assert plot_logs.main([str(logs), "--value", value, "--out", str(tmp_path / name)]) == 0
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and pictures[0].startswith(b"<?xml" if name.endswith("svg") else b"\x89PNG")
    if name.endswith("svg"):  # text is text
        said = {"bytes": "header", "learning_rate": "learning rate of the matrices", "effects": "bits per byte against control"}[
            value
        ]
        assert said in pictures[0].decode()


def test_bytes_of_a_run_fill_its_bar(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plot_logs.draw_bytes(
        axes, [curve_of(tmp_path), curve_of(tmp_path, result={"stream_bytes": [300, 20, 300, 30], "artifact_bytes": 700}.items())]
    )
    widths = [patch.get_width() for patch in axes.patches]
    assert widths == pytest.approx([0.2, 0.02, 0.3, 0.03, 0.05])  # means over the two seeds of one name
    fills = {(patch.get_facecolor(), patch.get_hatch()) for patch in axes.patches}
    assert len(fills) == 5


def test_effects_are_the_tables(tmp_path):
    """1, 2, 6 against 3, 5, as test_arms.py has it by hand; an arm of one seed has the first arm's spread."""
    from matplotlib.figure import Figure

    scores = {"base": {1: 1.0, 2: 2.0, 3: 6.0}, "new": {1: 3.0, 2: 5.0}, "one": {1: 2.0}}
    lines = [{"arm": arm, "seed": seed, "settings": {}, "result": {"val_bpb": bpb, "roundtrip_val_bpb": bpb, "steps": 1}}
             for arm, seeds in scores.items() for seed, bpb in seeds.items()]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    axes = Figure().subplots()
    plot_logs.draw_effects(axes, plot_logs.scores_of(plot_logs.read_results(tmp_path / "results.jsonl")))
    (new, one) = axes.containers
    assert new.lines[0].get_xdata()[0] == 1 and one.lines[0].get_xdata()[0] == -1
    spans = [float(bar.get_segments()[0][1][0] - bar.get_segments()[0][0][0]) / 2 for bar in (new.lines[2][0], one.lines[2][0])]
    assert spans == pytest.approx([(7 / 3 + 2 / 2) ** 0.5, (7 * 4 / 3) ** 0.5])
    assert "hollow, dotted: one seed, with the spread of base" in axes.get_xlabel()
    assert [c.lines[0].get_markerfacecolor() for c in (new, one)] == [plot_logs.COLOURS[0], "white"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["new", "one"]


def test_effects_are_named_by_what_differs():
    assert plot_logs.what_differs(["A=1 B=2", "A=1 B=2 C=3", "A=1 B=5"]) == ["B=2", "B=2 C=3", "B=5"]
    assert plot_logs.what_differs(["A=1", "A=1 C=3"]) == ["A=1", "C=3"]
    assert plot_logs.what_differs(["control", "A=1"]) == ["control", "A=1"]


def test_long_names_leave_the_curves_their_room(tmp_path):
    widths = {}
    for name in ("short", "a_name_of_many_words_that_a_bench_has_made_of_settings"):
        (tmp_path / f"{name}.txt").write_text(LOG)
        options = plot_logs.parse_arguments(["x", "--out", "y.png"])
        figure = plot_logs.plot_curves([plot_logs.read_curve(tmp_path / f"{name}.txt")], options)
        figure.canvas.draw()
        widths[name] = figure.axes[0].get_position().width
    assert all(width > 0.6 for width in widths.values()), widths


def test_effects_of_single_seeds_have_no_bars(tmp_path):
    from matplotlib.figure import Figure

    lines = [
        {"arm": arm, "seed": 1, "settings": {}, "result": {"val_bpb": 2.0, "roundtrip_val_bpb": 2.0, "steps": 1}} for arm in "ab"
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    axes = Figure().subplots()
    plot_logs.draw_effects(axes, plot_logs.scores_of(plot_logs.read_results(tmp_path / "results.jsonl")))
    assert axes.containers[0].lines[2] == () and axes.get_xlabel().endswith("hollow: of one seed no error is known")


@pytest.mark.parametrize(("log", "value", "said"), [
    (LOG, "learning_rate", "left out: run: its log has no number matrix_lr on its config line"),
    (LOG, "bytes", "left out: run: its log has no stream_bytes on its result line"),
    (LOG.replace(" zero_frac:0.333", ""), "zero_fraction", "--value zero_fraction: no log has one; train with CHURN_LOG_EVERY"),
    (run_log(settings={"matrix_lr": "high"}.items()), "learning_rate", "no number matrix_lr"),
    (run_log(settings={"warmdown_fraction": "much"}.items()), "learning_rate", "left out: run: the settings of its log: "),
    (run_log(result={"stream_bytes": {"trits": "many"}}.items()), "bytes", "no stream_bytes"),
    (run_log().replace('"iterations": 100', '"iterations": Infinity'), "loss", "the config line holds the non-finite number Infinity"),
    (run_log(), "effects", "no results of bench/arms.py"),
], ids=lambda text: text[:30] if not text.startswith(("step:", "config ")) else "")  # fmt: skip
def test_what_a_log_does_not_have_is_said_and_no_picture_is_touched(log, value, said, tmp_path, capsys):
    (tmp_path / "run.txt").write_text(log)
    (tmp_path / "picture.png").write_text("the one before")
    assert plot(tmp_path, tmp_path / "run.txt", "--value", value) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.splitlines()[-1].startswith("plot_logs.py: error: ")
    assert (tmp_path / "picture.png").read_text() == "the one before" and len(list(tmp_path.iterdir())) == 2


def test_a_run_without_zeros_has_an_overview(tmp_path, capsys):
    (tmp_path / "run.txt").write_text(LOG)
    assert plot(tmp_path, tmp_path / "run.txt", "--value", "overview") == 0 and (tmp_path / "picture.png").exists()
    assert "left out: --value bytes" in capsys.readouterr().err


PICTURES = {"demo.png": "logs/R018_demo_seed*.txt --value overview", "effects.png": "logs/R016_recipe_p1.txt --value effects"}


@pytest.mark.parametrize("name", PICTURES)
def test_readmes_pictures_are_drawn_by_the_command_it_gives(name, tmp_path):
    """What README says makes a picture of the same size; its bytes depend on the machine's fonts and libraries."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = f"tools/plot_logs.py {PICTURES[name]} --out docs/pictures/{name}"
    assert command in readme and f"](docs/pictures/{name})" in readme
    logs, *rest = PICTURES[name].split()
    assert plot_logs.main([*map(str, sorted(ROOT.glob(logs))), *rest, "--out", str(tmp_path / name)]) == 0
    size = lambda path: path.read_bytes()[16:24]  # of a PNG: width, height
    assert size(tmp_path / name) == size(ROOT / "docs/pictures" / name)
    assert (ROOT / "docs/pictures" / name).stat().st_size < 150_000


def test_a_line_with_a_number_of_a_thousand_digits_is_no_line_of_a_log(tmp_path):
    """As a float it would be infinite, and an axis with it."""
    (tmp_path / "a.txt").write_text(
        f"step:1/9 loss:{'9' * 1000} t:5ms\nstep:2/{'9' * 5000} loss:3.5 t:6ms\nstep:3/9 loss:3.0 t:7ms\n"
    )
    assert plot_logs.read_curve(tmp_path / "a.txt").training == [(3, 0.007, 3.0)]
