"""The shape of train_gpt.py in numbers, counted on its syntax tree: the rules of a file that reads from top to bottom."""

from __future__ import annotations

import ast
import collections
import re
import statistics
import sys

from conftest import ROOT

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
LINES, TREE = SOURCE.splitlines(), ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
SECTIONS = [(i, *m.groups()) for i, line in enumerate(LINES, 1) if (m := re.match(r"# ---- (\d+) (.+?) -+$", line))]  # (line, number, title)

MOST_LINES = {"default": 2436, "kernels": 1544, "option": 2200, "all": 6180}


def kind(line: int) -> str:
    """Of the section that a line stands in; the titles of what is not the default path say so."""
    title = next((title for first, _, title in reversed(SECTIONS) if line >= first), "")
    return next((name for name in ("option", "kernels") if f"({name}" in title), "default")


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]


def test_sections_are_numbered_in_the_order_of_the_map():
    assert [int(number) for _, number, _ in SECTIONS] == [*range(1, 14)]
    docstring = " ".join(ast.get_docstring(TREE).split())
    for _, number, title in SECTIONS:
        assert f"{number} {title.split()[0]}" in docstring, title
    assert [title for _, _, title in SECTIONS if "(" in title] == ["Hardware (kernels)", "Options and codecs (option)"]


def test_no_kind_of_section_outgrows_its_limit():
    sizes = collections.Counter(kind(i) for i in range(1, len(LINES) + 1)) | {"all": len(LINES)}
    assert all(sizes[name] <= most for name, most in MOST_LINES.items()), sizes
    assert max(map(len, LINES)) <= 120


def test_the_default_path_uses_few_names_of_the_rest_and_no_setting_of_an_option():
    home, optional = {}, set()
    for node in TREE.body:
        home |= dict.fromkeys(names_of(node), kind(node.lineno))
        if isinstance(node, ast.ClassDef) and kind(node.lineno) == "option":
            optional |= {a.target.id for a in node.body if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)}
    assert {"mlp_hidden", "ema"} <= optional and home["Bank"] == "kernels" and home["choose_parts"] == "option"
    default = [x for node in TREE.body if kind(node.lineno) == "default" for x in ast.walk(node)]
    used = collections.Counter(x.id for x in default if isinstance(x, ast.Name) and home.get(x.id, "default") != "default")
    assert len(used) <= 15 and sum(used.values()) <= 22, used
    assert not {x.attr for x in default if isinstance(x, ast.Attribute)} & optional


def test_functions_are_short_and_flat_and_constructors_take_the_config_whole():
    lengths = {f"{f.name}:{f.lineno}": f.end_lineno - f.lineno + 1 for f in FUNCTIONS}
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    assert statistics.median(lengths.values()) <= 10
    for f in FUNCTIONS:
        if f.name == "__init__":
            assert len(f.args.posonlyargs + f.args.args + f.args.kwonlyargs) - 1 <= 4, f.lineno
        assert depth(f) - 1 <= 4, f"{f.name}:{f.lineno}"


def depth(node: ast.AST) -> int:
    """Compound statements around the innermost one, `elif` not counted."""
    inner = [depth(child) for child in ast.iter_child_nodes(node)]
    if isinstance(node, ast.If):  # an elif is an If alone in orelse
        alone = len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
        inner = [depth(child) for child in ast.iter_child_nodes(node) if not (alone and child is node.orelse[0])]
        inner.append(depth(node.orelse[0]) - 1 if alone else 0)
    own = isinstance(node, (ast.FunctionDef, ast.For, ast.While, ast.If, ast.With, ast.Try))
    return own + max(inner, default=0)


def test_no_global_no_pickle_no_names_as_structure():
    assert not [n for n in ast.walk(TREE) if isinstance(n, ast.Global)]
    imported = {a.name for n in ast.walk(TREE) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert not imported & {"pickle", "marshal", "shelve"}
    assert "torch.load" not in SOURCE and "torch.save" not in SOURCE
    for n in ast.walk(TREE):  # `"tok_emb" in name` decides nothing here
        if isinstance(n, ast.Compare) and isinstance(n.ops[0], (ast.In, ast.NotIn)):
            text = isinstance(n.left, ast.Constant) and isinstance(n.left.value, str)
            assert not (text and isinstance(n.comparators[0], ast.Name) and n.comparators[0].id == "name"), n.lineno


def test_the_environment_is_read_in_few_places_only():
    inside = {id(n): f.name for f in FUNCTIONS for n in ast.walk(f)}
    users = {inside.get(id(n), "the file") for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")}
    # who this process is; the caches of compiled kernels; the file itself: how OpenMP's threads wait
    assert users <= {"from_env", "speaks", "name", "machine", "tell_torchrun", "keep_compiled", "the file"}


def test_runtime_needs_torch_numpy_sentencepiece_and_the_standard_library():
    """The others where they are found, or asked for."""
    tops = {a.name.split(".")[0] for n in ast.walk(TREE) if isinstance(n, ast.Import) for a in n.names}
    tops |= {n.module.split(".")[0] for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom)}
    assert tops - set(sys.stdlib_module_names) == {
        "torch", "numpy", "sentencepiece", "flash_attn_interface", "triton", "zstandard", "tqdm", "wandb", "trackio",
    }  # fmt: skip
