"""What the command lines in tools/ and bench/ share: an error is one line and exit code 2, a module says that it is one."""

import argparse
import sys
from pathlib import Path


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that shows a file's docstring as its help and refuses in one line."""

    def __init__(self, doc=None, **options):
        super().__init__(**{"description": doc, "formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_command(main, *mistakes):
    """Exit code of a command: `main`'s (None is 0), or 2 where it raises OSError or one of `mistakes`, said in one line."""
    try:
        return main() or 0
    except (OSError, *mistakes) as error:
        text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else " ".join(str(error).split("\n"))
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        return 2


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
