#!/usr/bin/env python3
"""The notebook of a script whose cells begin with `# %%`: `# %% [markdown]` for text, in comments, and `# %%` for code.

    make_notebook.py examples/tour.py      writes examples/tour.ipynb

The notebook has no outputs. What is for the linter of a script (`# noqa`, `# fmt`) is left out.
"""

import json
import re
from pathlib import Path

from command_line import OneLineParser, run_command, start
from shard_io import UserError

CELL = re.compile(r"^# %%( \[markdown\])?$", re.MULTILINE)
FOR_THE_LINTER = re.compile(r"  # (noqa|fmt): .*$", re.MULTILINE)
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}


def notebook_of(script):
    """The notebook of a script's text, as the text of its file; UserError unless the script begins with a cell."""
    before, *parts = CELL.split(script)
    if before.strip() or not parts:
        raise UserError("expected a first line '# %%' or '# %% [markdown]'")
    cells = [cell(number, bool(kind), text) for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True))]
    return json.dumps({"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"


def cell(number, is_text, text):
    """One cell, as nbformat 4.5 has it."""
    if is_text:
        text = re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
        kind = {"cell_type": "markdown"}
    else:
        text = FOR_THE_LINTER.sub("", text.strip())
        kind = {"cell_type": "code", "execution_count": None, "outputs": []}
    return kind | {"id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}


def parse_arguments(argv):
    parser = OneLineParser(__doc__)
    parser.add_argument("script", metavar="SCRIPT", type=Path, help="a .py file; the notebook is written beside it")
    return parser.parse_args(argv)


def write_notebook(script):
    if script.suffix != ".py":
        raise UserError(f"{script}: expected a .py file")
    try:
        text = script.read_text(encoding="utf-8")
        script.with_suffix(".ipynb").write_text(notebook_of(text), encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{script}: not UTF-8") from None
    except UserError as error:
        raise UserError(f"{script}: {error}") from None


def main(argv=None):
    options = parse_arguments(argv)
    return run_command(lambda: write_notebook(options.script), UserError)


if __name__ == "__main__":
    start(main)
