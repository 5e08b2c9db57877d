"""bench/scaling.py: the line through an effect at several sizes."""

import importlib.util
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "bench/scaling.py"
spec = importlib.util.spec_from_file_location("scaling", FILE)
scaling = importlib.util.module_from_spec(spec)
sys.modules["scaling"] = scaling
spec.loader.exec_module(scaling)


def write(path, weights, control, arm, name="EMBED_DIM=40 X=1"):
    """results.jsonl with the scores of two arms, by seed."""
    result = {"steps": 9, "tokens": 8 * weights, "ternary_params": weights}
    rows = [{"arm": a, "seed": seed, "settings": {}, "result": result | {"val_bpb": bpb, "roundtrip_val_bpb": bpb},
             "web": {"roundtrip_val_bpb": bpb + 0.1}} for a, scores in (("control", control), (name, arm))
            for seed, bpb in enumerate(scores)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_points_and_their_errors_are_those_of_the_seeds(tmp_path):
    control, arm = [2.0, 2.02, 2.01], [1.95, 1.99, 1.97]
    point = scaling.point_of(write(tmp_path / "r", 100_000, control, arm), "EMBED_DIM=* X=1")
    assert (point.weights, point.tokens) == (100_000, 800_000)
    assert point.control.mean == pytest.approx(2.06)  # of both sets
    assert point.difference.mean == pytest.approx(statistics.fmean(arm) - statistics.fmean(control))
    spread = math.sqrt((statistics.variance(control) + statistics.variance(arm)) / 3)
    assert point.difference.error == pytest.approx(spread)


def test_the_errors_of_the_line_are_those_of_repeated_measurements():
    """Points drawn anew around a known line: the fit finds it, and scatters as much as it says."""
    source, sizes, sigmas = random.Random(5), [9e4, 3e5, 7.2e5], [0.004, 0.002, 0.003]
    truth = lambda n: -0.05 + 0.02 * math.log10(n / 1e6)
    values, said, chi2 = [], [], []
    for _ in range(3000):
        points = [scaling.Point(n, 0, None, scaling.Estimate(source.gauss(truth(n), s), s, 3)) for n, s in zip(sizes, sigmas, strict=True)]
        line = scaling.fit(points)
        value, error = line.at(6.5e7)
        values.append(value), said.append(error), chi2.append(line.chi2)
    assert statistics.fmean(values) == pytest.approx(truth(6.5e7), abs=4 * said[0] / math.sqrt(3000))
    assert statistics.stdev(values) == pytest.approx(said[0], rel=0.05)
    assert statistics.fmean(chi2) == pytest.approx(1, abs=0.1)  # three points, a line of two parameters


def command(*arguments):
    done = subprocess.run([sys.executable, str(FILE), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_table_says_prediction_and_names_what_it_rests_on(tmp_path):
    files = [write(tmp_path / str(n), n, [2.0, 2.01], [1.9, 1.92]) for n in (800_000, 90_112, 304_128)]
    code, out, _ = command(*files, "--arm", "EMBED_DIM=* X=1")
    assert code == 0 and out.index("| 90,112 |") < out.index("| 304,128 |") < out.index("| 800,000 |")
    assert "-0.0950 ± 0.0112 (2)" in out and re.search(r"slope [+-]0\.0000 ± ", out)
    assert "extrapolated to 64,880,640 ternary weights: -0.0950" in out and "a prediction, not a measurement" in out


@pytest.mark.parametrize(("change", "said"), [
    ("missing", "no such file"), ("pattern", "0 arms fit 'Y=1', expected one of 'control', 'EMBED_DIM=40 X=1'"),
    ("seeds", "has 1 seed, expected two or more"), ("sizes", "2 sizes: expected three or more"), ("weights", "--weights 0: expected 1 or more"),
])  # fmt: skip
def test_what_cannot_be_fitted_is_said_in_a_line(tmp_path, change, said):
    files = [write(tmp_path / str(n), n, [2.0, 2.01], [1.9, 1.92]) for n in (90_112, 304_128, 720_896)]
    if change == "missing":
        files[0] = tmp_path / "none"
    if change == "seeds":
        write(files[0], 90_112, [2.0, 2.01], [1.9])
    if change == "sizes":
        write(files[0], 304_128, [2.0, 2.01], [1.9, 1.92])
    more = ("--weights", "0") if change == "weights" else ()
    code, out, err = command(*files, "--arm", "Y=1" if change == "pattern" else "EMBED_DIM=* X=1", *more)
    assert code == 2 and said in err and err.count("\n") == 1 and not out


def test_the_default_model_has_so_many_ternary_weights():
    import torch

    import train_gpt

    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config())
    ternary = sum(p.numel() for _, _, p, role in train_gpt.parameter_owners(model) if role.storage == "ternary")
    assert ternary == scaling.DEFAULT_WEIGHTS
