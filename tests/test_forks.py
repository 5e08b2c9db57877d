"""tests/forks.py: a forked process is what a fresh interpreter would have been."""

from __future__ import annotations

import signal

import pytest
from conftest import launch

SHOW = """
import atexit, os, sys, tempfile
def f(x: print("annotations are computed")): ...
atexit.register(print, "at the exit")
print(sys.argv, sys.path, __name__, vars().get("__file__"), os.getcwd(), tempfile.gettempdir(), os.getsid(0) == os.getpid())
print(sorted(os.environ.items()), sys.dont_write_bytecode, sys.stdout.line_buffering, sys.stdout.encoding, sys.stderr.errors, sys.stdin.read())
print("\\u00e9", file=sys.stderr)
import own
print(own.__file__, sys.modules["__main__"].f is f, "forks" in sys.modules, threading_is_alone())
"""
ALONE = "import os\ndef threading_is_alone(): return len(os.listdir('/proc/self/task')) == 1 if os.path.isdir('/proc') else True\n"
ENDS = {"sys.exit(7)": 7, "sys.exit('in words')": 1, "1 / 0": 1, "os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL, "os._exit(3)": 3}


@pytest.mark.parametrize("kind", ["file", "text"])
def test_a_fork_sees_what_a_fresh_interpreter_sees(kind, tmp_path):
    (tmp_path / "it.py").write_text(ALONE + SHOW)
    (tmp_path / "lib").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "lib/own.py").touch()
    env = {"PYTHONPATH": str(tmp_path / "lib"), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path / "tmp"), "A": "b \u00e9"}
    argv = {"file": ["it.py", "x", "y z"], "text": ["-c", ALONE + SHOW, "x"]}[kind]
    forked, fresh = (launch(env, tmp_path, argv=argv, fresh=fresh) for fresh in (False, True))
    assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert forked.returncode == 0 and forked.stdout.endswith("True False True\nat the exit\n") and "annotations are computed" in forked.stdout


def test_every_end_is_told(tmp_path):
    for text, code in ENDS.items():
        done = launch({}, tmp_path, argv=["-c", f"import os, signal, sys\n{text}"])
        assert done.returncode == code, text
        assert done.stderr.splitlines()[-1:] == {"1 / 0": ["ZeroDivisionError: division by zero"], "sys.exit('in words')": ["in words"]}.get(text, [])
