"""The demo corpus: the English documentation inside three pinned packages, the same text on every machine.

It is read from the installed .py files with `ast`, never by importing them, so it depends on the packages' versions only,
not on Python's. One document per docstring of 80 characters or more: the training documents shuffled, the validation
documents in the order of their modules.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import warnings
from collections import defaultdict
from pathlib import Path

from shard_io import UserError

PACKAGES = ("sympy", "networkx", "numpy")
MIN_DOCSTRING_CHARS = 80
VAL_FRACTION = 0.075  # of each package's text: 590 KB in all
LONG_LINE_CHARS = 100
SHINGLE_WORDS = 8
MAX_SHARED_RUNS = 0.2  # boilerplate ("G : NetworkX graph") stays under it, copied paragraphs do not
META_SPACE = "\u2581"  # SentencePiece's own space: it decodes to " ", so text that holds it cannot round-trip

# Differ by platform or by Python version: numpy.distutils is absent from Python 3.12 on.
SKIPPED = ("numpy/__config__.py", "numpy/version.py", "numpy/_distributor_init", "numpy/distutils/")
SKIPPED_FOLDERS = {"tests", "__pycache__"}


def package_versions():
    """{package: installed version}; UserError names the package that is missing."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"package {error.name}: not installed, expected {', '.join(PACKAGES)} (pip install -r requirements.txt)"
        ) from None


def source_files(package):
    """[(name relative to site-packages, path)] of a package's modules, sorted; the package is not imported."""
    root = Path(next(iter(importlib.util.find_spec(package).submodule_search_locations)))
    names = ((path.relative_to(root.parent).as_posix(), path) for path in root.rglob("*.py"))
    kept = (
        (name, path)
        for name, path in names
        if not name.startswith(SKIPPED) and SKIPPED_FOLDERS.isdisjoint(name.split("/"))
    )
    return sorted(kept)


def docstrings(source):
    """Cleaned docstrings of one module's source (bytes), in source order, numpy's `add_newdoc` texts among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
        tree = ast.parse(source)
    texts = (inspect.cleandoc(text) for text in _docstring_literals(tree))
    return [text for text in texts if len(text) >= MIN_DOCSTRING_CHARS and META_SPACE not in text]


def _docstring_literals(node):
    """Raw docstrings of a statement and of the statements inside it; expressions are not searched."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            yield text
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield from _newdoc_literals(node.value)
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            yield from _docstring_literals(child)


def _newdoc_literals(call):
    """The string arguments of `add_newdoc(...)`, numpy's way to document what is written in C."""
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    if not name.startswith("add_newdoc"):
        return
    for argument in call.args:
        for node in ast.walk(argument):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def load_modules():
    """{module file name: [docstring, ...]} over all packages, each docstring once (at its first place)."""
    seen, modules, collects = set(), {}, gc.isenabled()
    gc.disable()  # syntax trees have no cycles: to look for some takes a third of the time
    try:
        for package in PACKAGES:
            for name, path in source_files(package):
                texts = [text for text in docstrings(path.read_bytes()) if not (text in seen or seen.add(text))]
                if texts:
                    modules[name] = texts
    finally:
        if collects:
            gc.enable()
    return modules


def held_out_folders(modules):
    """Folders (subpackages) whose modules are the validation split.

    Per package: folders in the order of the SHA-256 of their name, each taken if the package's held-out text stays
    within VAL_FRACTION of its characters.
    """
    sizes = defaultdict(lambda: defaultdict(int))
    for name, texts in modules.items():
        sizes[name.split("/")[0]][folder_of(name)] += sum(map(len, texts))
    held_out = set()
    for folders in sizes.values():
        room = VAL_FRACTION * sum(folders.values())
        for folder in sorted(folders, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
            if folders[folder] <= room:
                room -= folders[folder]
                held_out.add(folder)
    return held_out


def folder_of(module):
    """'numpy/fft/helper.py' -> 'numpy/fft'"""
    return module.rpartition("/")[0]


def long_lines(text):
    """The stripped lines of at least LONG_LINE_CHARS characters."""
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= LONG_LINE_CHARS}


def shingles(text):
    """All runs of SHINGLE_WORDS words."""
    words = text.split()
    return set(zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False))


def drop_near_duplicates(train, val):
    """Training modules without the docstrings that a validation docstring resembles.

    Dropped: a docstring that shares a long line with the validation text, or has a fifth of its 8-word runs in it.
    """
    val_texts = [text for texts in val.values() for text in texts]
    val_lines = set().union(*map(long_lines, val_texts))
    val_shingles = set().union(*map(shingles, val_texts))

    def is_new(text):
        runs = shingles(text)
        shared = len(runs & val_shingles)
        return val_lines.isdisjoint(long_lines(text)) and (shared == 0 or shared < MAX_SHARED_RUNS * len(runs))

    kept = {name: [text for text in texts if is_new(text)] for name, texts in train.items()}
    return {name: texts for name, texts in kept.items() if texts}


def load_demo_corpus():
    """(training documents, validation documents), lists of strings."""
    modules = load_modules()
    held_out = held_out_folders(modules)
    val = {name: texts for name, texts in modules.items() if folder_of(name) in held_out}
    train = {name: texts for name, texts in modules.items() if folder_of(name) not in held_out}
    return shuffled(as_documents(drop_near_duplicates(train, val))), as_documents(val)


def as_documents(modules):
    """One document per docstring, ending in a newline so that documents can simply be concatenated."""
    return [text + "\n" for name in sorted(modules) for text in modules[name]]


def shuffled(documents):
    """A fixed random order (by SHA-256): a short run sees all three packages, and a step holds unrelated texts."""
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


if __name__ == "__main__":
    from command_line import not_a_command

    not_a_command("tools/prepare_data.py")
