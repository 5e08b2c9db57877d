"""examples/tour.py, and the notebook that is made of it, at a tiny size: as a script, and in a Jupyter kernel where nbclient is there."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess

import make_notebook
import pytest
from conftest import ROOT, TINY, launch
from shard_io import UserError

SCRIPT, NOTEBOOK = ROOT / "examples/tour.py", ROOT / "examples/tour.ipynb"
PNG = b"\x89PNG\r\n\x1a\n"


def tiny(data_dir, work):
    """The environment of a tour that takes seconds, in a folder of its own."""
    return TINY | {"DATA_PATH": str(data_dir), "WORK_DIR": str(work), "MAX_WALLCLOCK_SECONDS": "5", "ITERATIONS": "8"}


def check_tour(said, work):
    """The tour went from ternary weights to a score, a text and a picture, and wrote into its folder alone."""
    result = json.loads((work / "logs/tour.txt").read_text().rpartition("\nresult ")[2])
    assert result["steps"] == 8 and f"{result['roundtrip_val_bpb']:.4f} bits per byte; {result['artifact_bytes']:,} bytes" in said
    assert len((work / "logs/tour.ternary.ptz").read_bytes()) == result["artifact_bytes"]
    assert (work / "logs/tour.png").read_bytes().startswith(PNG)
    assert "3 layers of width 64" in said and "sample.py: " in said and "tokens" in said


def test_the_notebook_is_the_script():
    assert NOTEBOOK.read_text() == make_notebook.notebook_of(SCRIPT.read_text()), "python tools/make_notebook.py examples/tour.py"
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(SCRIPT.read_text()))  # nothing of the program is lost on the way
    assert "noqa" not in code and all(cell.get("outputs", []) == [] for cell in cells)
    words = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    comments = re.findall(r"# %% \[markdown\]\n((?:#.*\n)+)", SCRIPT.read_text())
    assert re.findall(r"\w+", words) == re.findall(r"\w+", "".join(comments)) and words.startswith("# A tour")


@pytest.mark.slow
def test_the_script_goes_from_the_import_to_a_picture(data_dir, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-test.txt")
    before = sorted(ROOT.glob("logs/*"))
    done = launch(tiny(data_dir, tmp_path / "work"), tmp_path, argv=[str(SCRIPT)])
    assert done.returncode == 0, done.stderr[-2000:]
    check_tour(done.stdout, tmp_path / "work")
    assert sorted(ROOT.glob("logs/*")) == before


@pytest.mark.campaign
def test_the_notebook_runs_in_a_kernel_with_the_same_end(data_dir, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-extra.txt")
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-extra.txt")
    pytest.importorskip("ipykernel", reason="pip install -r requirements-extra.txt")
    pytest.importorskip("matplotlib", reason="pip install -r requirements-test.txt")
    for name, value in tiny(data_dir, tmp_path / "work").items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    check_tour("".join(output.text for output in outputs if output.output_type == "stream"), tmp_path / "work")
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]


def test_a_tour_without_a_checkout_says_what_to_do(tmp_path):
    shutil.copy2(SCRIPT, tmp_path / "tour.py")
    done = launch({}, tmp_path, argv=["tour.py"])
    assert done.returncode == 1 and done.stderr == (
        "no train_gpt.py around this notebook: fill in REPOSITORY above, or put the notebook into a checkout\n")  # fmt: skip


def test_a_tour_without_a_checkout_clones_the_repository_that_is_filled_in(tmp_path):
    """Up to the first import of the program, which the stub ends."""
    origin, place = tmp_path / "origin", tmp_path / "place"
    for folder in (origin, place):
        folder.mkdir()
    (origin / "train_gpt.py").write_text("raise SystemExit('the clone is imported')\n")
    git = ["git", "-C", origin, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for words in (["init", "--quiet"], ["add", "train_gpt.py"], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    text = SCRIPT.read_text()
    assert text.count('REPOSITORY = ""') == 1
    (place / "tour.py").write_text(text.replace('REPOSITORY = ""', f'REPOSITORY = "file://{origin}"'))
    done = launch({}, place, argv=["tour.py"])
    assert done.returncode == 1 and done.stderr == "the clone is imported\n" and (place / "ternary-gpt/.git").is_dir()


@pytest.mark.parametrize("text, said", [("x = 1\n# %%\n", "expected a first line '# %%'"), ("x = 1\n", "expected a first line"), ("", "expected a first line")])
def test_a_script_without_cells_is_refused(tmp_path, capsys, text, said):
    path = tmp_path / "a.py"
    path.write_text(text)
    assert make_notebook.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: {said}" in error and error.count("\n") == 1 and not path.with_suffix(".ipynb").exists()
    with pytest.raises(UserError):
        make_notebook.notebook_of(text)


def test_a_file_that_is_no_script_is_refused_and_kept(tmp_path, capsys):
    path = tmp_path / "a.ipynb"
    path.write_text("# %%\n")
    assert make_notebook.main([str(path)]) == 2 and "expected a .py file" in capsys.readouterr().err
    assert path.read_text() == "# %%\n"
    assert make_notebook.main([str(tmp_path / "none.py")]) == 2
    assert "none.py: No such file or directory" in capsys.readouterr().err


def test_a_tour_that_cannot_install_what_is_missing_says_so(tmp_path):
    """PIP_NO_INDEX: pip finds nothing, as without a network or a place to write."""
    (tmp_path / "train_gpt.py").touch()
    (tmp_path / "tour.py").write_text(SCRIPT.read_text().replace('"matplotlib")', '"no-package-of-this-name")'))
    done = launch({"PIP_NO_INDEX": "1"}, tmp_path, argv=["tour.py"])
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        "pip could not install no-package-of-this-name, for the reason above; install them, and start again")  # fmt: skip
