"""The shape of the file, and that what is written about the project is true."""

from __future__ import annotations

import ast
import dataclasses
import re
import statistics

from conftest import ROOT

import train_gpt

SOURCE = (ROOT / "train_gpt.py").read_text()
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def test_the_file_keeps_its_shape():
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [n.body[0] for n in ast.walk(TREE) if isinstance(n, documented) and ast.get_docstring(n)]
    skipped = {line for d in docstrings for line in range(d.lineno, d.end_lineno + 1)}
    part, count = "default", {"default": 0, "kernels": 0, "option": 0}
    for i, line in enumerate(SOURCE.splitlines(), 1):
        if line.startswith("# ---- "):  # a section; what is not the default path says so in its heading
            part = next((name for name in count if f"({name})" in line), "default")
        count[part] += i not in skipped and line.strip() != "" and line.strip()[0] != "#"
    assert count["default"] <= 1300 and count["kernels"] <= 900 and sum(count.values()) <= 3000, count
    assert max(len(line) for line in SOURCE.splitlines()) <= 130
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in FUNCTIONS}
    assert lengths.pop("train") <= 110
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    assert statistics.median(lengths.values()) <= 10
    for f in FUNCTIONS:
        if f.name == "__init__":
            assert len(f.args.args) - 1 <= 4, f.lineno


def test_no_global_no_pickle_no_names_as_structure():
    assert not [n for n in ast.walk(TREE) if isinstance(n, ast.Global)]
    imported = {a.name for n in ast.walk(TREE) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert not imported & {"pickle", "marshal", "shelve"}
    assert "torch.load" not in SOURCE and "torch.save" not in SOURCE
    for n in ast.walk(TREE):  # `"tok_emb" in name` decides nothing here
        if isinstance(n, ast.Compare) and any(isinstance(op, (ast.In, ast.NotIn)) for op in n.ops):
            assert not (isinstance(n.left, ast.Constant) and isinstance(n.left.value, str) and isinstance(n.comparators[0], ast.Name) and n.comparators[0].id == "name")


def test_runtime_needs_torch_numpy_sentencepiece_and_the_standard_library():
    import sys

    tops = {a.name.split(".")[0] for n in ast.walk(TREE) if isinstance(n, ast.Import) for a in n.names}
    tops |= {n.module.split(".")[0] for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom)}
    assert tops - set(sys.stdlib_module_names) == {"torch", "numpy", "sentencepiece", "flash_attn_interface", "triton", "zstandard"}


def test_readme_names_every_setting():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    missing = {f.name.upper() for f in dataclasses.fields(train_gpt.Config)} - {*re.findall(r"[A-Z][A-Z0-9_]+", " ".join(rows))}
    assert not missing
