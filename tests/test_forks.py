"""tests/forks.py: a forked process is what a fresh interpreter would have been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import clean_env, launch, python

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


@pytest.mark.parametrize("words", [
    "it.py x 'y z'", "-u it.py", "-c 'import sys; print(sys.argv, sys.path[0], sys.stdin.read())' x", "- x <<< 'import sys; print(sys.argv, __name__)'",
    "-m it x", "-S -c 'import sys; print(sys.flags)'", "-c 'import sys; print(1 / 0)'", "nothing.py", "-c 'import sys; sys.exit(7)'",
    "-c 'import os; os.kill(0, 15)'", "-c 'import os; os.write(3, b\"3\")' 3>&1", "bad.py", "nested.py", "left_open.py", "it.py > /dev/full", "-c 'import sys; sys.exit(-1)'",
])  # fmt: skip
def test_a_shell_gets_from_the_file_what_it_gets_from_python(words, tmp_path):
    """But that a traceback has the server's frames above, and that standard output is described in other words."""
    (tmp_path / "it.py").write_text(ALONE + SHOW)
    (tmp_path / "bad.py").write_text("print(1)\nif 1 is 1: x = = 2\n")
    (tmp_path / "nested.py").write_text("import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-m', 'it', 'x'], start_new_session=True).returncode)\n")
    (tmp_path / "left_open.py").write_text("import atexit\nfile = open('left', 'w')\nfile.write('kept')\natexit.register(lambda: print(open('left').read()))\n")
    (tmp_path / "own.py").touch()
    env = clean_env() | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "A": "b \u00e9"}
    forked, fresh = (subprocess.run(["setsid", "bash", "-c", f"exec '{name}' {words}"], cwd=tmp_path, env=env, input="said\n", capture_output=True, text=True)
                     for name in (python(), sys.executable))  # fmt: skip
    assert words != "left_open.py" or (tmp_path / "left").read_text() == "kept"
    assert (forked.returncode, forked.stdout, forked.stderr.splitlines()[-1:]) == (fresh.returncode, fresh.stdout, fresh.stderr.splitlines()[-1:])
    assert "Traceback" in fresh.stderr or words in ("bad.py", "it.py > /dev/full") or forked.stderr == fresh.stderr


def test_it_is_a_fork_and_dies_with_the_file():
    """It has torch from the start; a signal is handed on; killed, it leaves nobody behind."""
    code = "import sys, os, time; print('torch' in sys.modules, sys.executable, os.getpid(), sep='\\n', flush=True); time.sleep(60)"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        child = subprocess.Popen([python(), "-c", code], env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        torch, executable, pid = (child.stdout.readline().rstrip("\n") for _ in range(3))
        assert (torch, executable) == ("True", python()) and int(pid) != child.pid
        child.send_signal(number)
        assert child.wait(20) == -number
        child.stdout.close()
        until = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
            time.sleep(0.01)
        assert not os.path.exists(f"/proc/{pid}")
