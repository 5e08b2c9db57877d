"""Processes of their own without an import of torch each, which costs more than most of what the tests do in them: they are forked
from a server that has it. Everything else is as in `python script.py`: the environment, the folder, `sys.argv`, `__main__`, the exit
code, signals, standard output and error.

The server is a bare interpreter with the modules below and nothing of the tests. It ends with the test session that started it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import types
import warnings
from pathlib import Path

# What is read when an interpreter or one of these modules starts: a process that says more of it than the server was told is started, not forked
AT_THE_START = ("PYTHON", "TORCH", "OMP_", "MKL_", "OPENBLAS_", "LD_", "LANG", "LC_", "MALLOC_")
LEFT = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")  # of these: what a fork can be told
MODULES = "numpy sentencepiece tqdm torch torch.distributed"


class Fork:
    """A forked process, as far as the tests use `subprocess.Popen`'s ways."""

    def __init__(self, status: int) -> None:
        self.status, self.returncode = status, None
        self.pid = int(self._line())

    def _line(self) -> str:
        text = b""
        while not text.endswith(b"\n"):
            if not (character := os.read(self.status, 1)):
                raise RuntimeError("the server of tests/forks.py has ended")
            text += character
        return text.decode()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal."""
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            self.returncode = int(self._line())
            os.close(self.status)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


_server: list = []  # its socket and its process, once it is there


def _start_server(env: dict[str, str]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forks; forks.serve({theirs.fileno()})"
    child = subprocess.Popen([sys.executable, "-c", code], env=env, pass_fds=[theirs.fileno()], start_new_session=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
    theirs.close()
    _server[:] = [ours, child]
    return ours


def can_fork(env: dict[str, str]) -> bool:
    """Whether a fork can have this environment."""
    return sys.platform == "linux" and not any(name.startswith(AT_THE_START) and name not in LEFT for name in env)


def fork(argv: list[str], cwd: Path, base: dict[str, str], env: dict[str, str], out: int, err: int) -> Fork:
    """`python *argv` in a folder and a session of its own. `base` is the environment that the server starts with, `env` what comes on
    top (`can_fork`); standard output and error go to two open files."""
    ours = _server[0] if _server else _start_server(base)
    status, theirs = os.pipe()
    request = json.dumps({"argv": argv, "cwd": str(cwd), "env": base | env}).encode()
    socket.send_fds(ours, [request], [out, err, theirs])
    os.close(theirs)
    return Fork(status)


# -------------------------------------------------------------------------------------------------- the server


def serve(number: int) -> None:
    """Fork what is asked for, and say how it ended, until the other end goes away."""
    for name in MODULES.split():
        with contextlib.suppress(ImportError):
            __import__(name)
    ours = socket.socket(fileno=number)
    statuses: dict[int, int] = {}
    woken, waker = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([ours, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _tell_who_ended(statuses)
        if ours in ready:
            request, files, _, _ = socket.recv_fds(ours, 1 << 20, 3)
            if not request:
                return
            asked = json.loads(request)
            with contextlib.suppress(OSError, SyntaxError, ValueError), warnings.catch_warnings():  # which the fork will tell
                warnings.simplefilter("error")
                _compiled(Path(asked["cwd"], asked["argv"][0]).read_bytes(), asked["argv"][0])  # here: for the next fork too
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                for f in (ours.fileno(), woken, waker, files[2], *statuses.values()):
                    os.close(f)
                ours.detach()
                _become(asked, *files[:2])
                return
            for f in files[:2]:
                os.close(f)
            statuses[pid] = files[2]
            os.write(files[2], f"{pid}\n".encode())


def _tell_who_ended(statuses: dict[int, int]) -> None:
    while statuses:
        pid, state = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        status = statuses.pop(pid)
        with contextlib.suppress(BrokenPipeError):
            os.write(status, f"{os.waitstatus_to_exitcode(state)}\n".encode())
        os.close(status)


@functools.lru_cache(maxsize=64)
def _compiled(source: str | bytes, name: str) -> types.CodeType:
    return compile(source, name, "exec", dont_inherit=True)


def _become(asked: dict, out: int, err: int) -> None:
    """Run what is asked for as a fresh interpreter would; returns as its main module does, or raises what that raises."""
    import tempfile

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for here, there in ((out, 1), (err, 2)):
        os.dup2(here, there)
        os.close(here)
    streams = {name: open(file, "w", buffering=buffering, encoding=stream.encoding, errors=stream.errors, closefd=False)
               for file, name, buffering, stream in ((1, "stdout", -1, sys.stdout), (2, "stderr", 1, sys.stderr))}  # fmt: skip
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = streams.values()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    tempfile.tempdir = None
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    kind, *rest = asked["argv"]
    del sys.path[:2], sys.modules["forks"]  # the tests' folder, and that of `-c`
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    main = types.ModuleType("__main__")
    if kind == "-c":
        source, name, sys.argv = rest[0], "<string>", ["-c", *rest[1:]]
        sys.path.insert(0, "")
    else:
        source, name, sys.argv = Path(kind).read_bytes(), kind, [kind, *rest]
        main.__file__ = kind if os.path.isabs(kind) else os.path.join(os.getcwd(), kind)
        sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
    sys.modules["__main__"] = main
    exec(_compiled(source, name), vars(main))
