"""What the command lines in tools/ and bench/ share: an error is one line and exit code 2, a module says that it is one."""

import argparse
import os
import re
import sys
from pathlib import Path


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that shows a file's docstring as its help and refuses in one line."""

    def __init__(self, doc=None, **options):
        super().__init__(**{"description": doc, "formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class BadArguments(ValueError):
    """What the command line asks for cannot be run; the text names it."""


def read_preset(path):
    """KEY -> value of a preset file (KEY=VALUE lines and comments); BadArguments for anything else."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise BadArguments(f"preset {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadArguments(f"preset {path}: not a text file: {error}") from None
    settings = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            if not (found := re.fullmatch(r"([A-Z][A-Z0-9_]*)=(\S*)", line)):  # as tools/common.sh has it
                raise BadArguments(f"preset {path}, line {number}: {line!r} is neither KEY=VALUE nor a comment")
            settings[found[1]] = found[2]
    return settings


def describe(error):
    """An exception as one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split("\n"))


def run_command(main, *mistakes, name=None):
    """Exit code of a command: `main`'s (None is 0), or 2 where it raises OSError or one of `mistakes`, said in one line under
    the command's name (default: the program's). A reader that has gone away is no mistake: BrokenPipeError is `start`'s."""
    try:
        return main() or 0
    except BrokenPipeError:
        raise
    except (OSError, *mistakes) as error:
        print(f"{name or Path(sys.argv[0]).name}: error: {describe(error)}", file=sys.stderr)
        return 2


def start(main, *mistakes):
    """Run a command's main as `run_command` does and end with its code. A console that lacks a character gets its escape; a
    reader that has gone away (`| head`) and Ctrl-C end it without a traceback, as they end other programs."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        code = run_command(main, *mistakes)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to write the rest at its end
        code = 141
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def not_a_command(command):
    """The end of a module that was started as if it were a command; `command` is what uses it."""
    name = Path(sys.argv[0]).name
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(f"{name} is a module of {command}: see {command} --help")
        sys.exit(0)
    print(f"{name}: error: it is a module of {command}, not a command: see {command} --help", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    not_a_command("tools/ and bench/")
