#!/usr/bin/env python3
"""What setup.sh asks about the environment it stands in.

    check_setup.py damaged               names of installed packages that have lost files
    check_setup.py missing REQUIREMENTS  the pins that are not installed
    check_setup.py absent MODULE...      those of the modules that cannot be found; exit code 1 before Python 3.10
    check_setup.py table REQUIREMENTS    a verification table; exit code 1 if something in it is MISSING
"""

import csv
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from command_line import OneLineParser, start

OK, MISSING, NOT_NEEDED = "OK", "MISSING", "not needed"
CODE_SUFFIXES = (".py", ".so", ".pyd", ".dylib")


# -------------------------------------------------------------------------------------------------- packages


def read_pins(requirement_files):
    """{name: version} of the `name==version` lines of requirements files."""
    lines = [line.partition("#")[0].strip() for path in requirement_files for line in path.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def installed_version(name):
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_installed(name, version):
    """True if the pin is met; a pin without a local part takes any build of its version (2.13.0 takes 2.13.0+cpu)."""
    return (installed_version(name) or "").partition("+")[0] == version


def missing_pins(requirement_files):
    return [f"{name}=={version}" for name, version in read_pins(requirement_files).items() if not is_installed(name, version)]


def lost_files(distribution):
    """Whether code that the package's record lists is not on the disk. (`distribution.files` hides it since Python 3.12.)"""
    root = distribution.locate_file("")
    listed = (row[0] for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()) if row)
    return any(not os.path.exists(os.path.join(root, file)) for file in listed if file.endswith(CODE_SUFFIXES))


def damaged_packages():
    return sorted(d.metadata["Name"] for d in importlib.metadata.distributions() if lost_files(d))


# -------------------------------------------------------------------------------------------------- table


class Row(NamedTuple):
    name: str
    value: str
    state: str = OK


IMPORTED_AS = {"pytest-xdist": "xdist", "PyYAML": "yaml"}


def package_row(name):
    """Import the package: an installed version that cannot be imported is of no use."""
    try:
        importlib.import_module(IMPORTED_AS.get(name, name.replace("-", "_")))
    except Exception as error:  # a broken binary raises OSError, AttributeError and others besides ImportError
        return Row(name, f"cannot be imported: {error}".splitlines()[0], MISSING)
    return Row(name, installed_version(name) or "?")


def device_row(torch):
    """The device train_gpt.py will use; a GPU that torch cannot see is said, since a CPU run is 1,000 times slower."""
    if torch.cuda.is_available():
        return Row("device", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} (CUDA {torch.version.cuda})")
    unseen = f"; torch {torch.__version__} does not see this machine's NVIDIA GPU" if shutil.which("nvidia-smi") else ""
    return Row("device", f"CPU, {torch.get_num_threads()} threads{unseen}")


def attention_row(torch):
    """The attention that train_gpt.py will take: FlashAttention-3 on Hopper where it is installed, else PyTorch's."""
    if not torch.cuda.is_available():
        return Row("attention", "PyTorch SDPA")
    hopper = torch.cuda.get_device_capability()[0] == 9
    if hopper and importlib.util.find_spec("flash_attn_interface"):
        return Row("attention", "FlashAttention-3")
    return Row("attention", "PyTorch SDPA, cuDNN first (no FlashAttention-3)" if hopper else "PyTorch SDPA")


def triton_row(torch):
    """Triton comes with torch's CUDA build and compiles for GPUs."""
    version = installed_version("triton")
    if version or not torch.cuda.is_available():
        return Row("triton", version or "GPUs only", OK if version else NOT_NEEDED)
    return Row("triton", "torch.compile needs it on a GPU", MISSING)


def data_rows(folder):
    """The files that the folder's manifest names, with sizes."""
    manifest = folder / "manifest.json"
    names = ["manifest.json", *json.loads(manifest.read_text())["files"]] if manifest.is_file() else ["manifest.json"]
    return [file_row(folder / name) for name in names]


def file_row(path):
    return Row(str(path), f"{path.stat().st_size:,} bytes") if path.is_file() else Row(str(path), "no such file", MISSING)


def environment_rows(requirement_files):
    packages = {name: package_row(name) for name in read_pins(requirement_files)}
    rows = [Row("python", platform.python_version()), packages.pop("torch")]
    if rows[-1].state == OK:
        torch = importlib.import_module("torch")
        rows += [device_row(torch), attention_row(torch), triton_row(torch)]
    return rows + list(packages.values())


def print_table(rows):
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for row in rows:
        print(f"{row.name:<{widths[0]}}  {row.value:<{widths[1]}}  {row.state}")


# -------------------------------------------------------------------------------------------------- command line


def table(args):
    rows = environment_rows(args.requirements) + (data_rows(args.data) if args.data else [])
    print_table(rows)
    missing = [row.name for row in rows if row.state == MISSING]
    if missing:
        print(f"setup.sh: error: missing: {', '.join(missing)} (a fresh start: rm -r {sys.prefix}, then setup.sh)", file=sys.stderr)
    return 1 if missing else 0


def absent(args):
    print(*(name for name in args.module if importlib.util.find_spec(name) is None), sep="\n", end="")
    return int(sys.version_info < (3, 10))  # noqa: UP036, an interpreter of the user's own


def main(argv=None):
    parser = OneLineParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=lambda **options: OneLineParser(None, **options))
    commands.add_parser("damaged")
    commands.add_parser("absent").add_argument("module", nargs="+")
    for name in ("missing", "table"):
        commands.add_parser(name).add_argument("requirements", nargs="+", type=Path)
    commands.choices["table"].add_argument("--data", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    if args.command in ("table", "absent"):
        return {"table": table, "absent": absent}[args.command](args)
    print(*(damaged_packages() if args.command == "damaged" else missing_pins(args.requirements)), sep="\n", end="")
    return 0


if __name__ == "__main__":
    start(main)
