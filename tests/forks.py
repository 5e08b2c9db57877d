"""Processes of their own without an import of torch each, which costs more than most of what the tests do in them: they are forked
from a server that has it. Everything else is as in `python script.py`: the environment, the folder, `sys.argv`, `__main__`, the exit
code, signals, standard output and error.

The server is a bare interpreter with the modules below and nothing of the tests. It ends with the test session that started it.
A script of the shell, or a program that starts others, gets forks from `interpreter`: a file that is called as Python is.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import marshal
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

# What is read when an interpreter or one of these modules starts: a process that says more of it than the server was told is started, not forked
AT_THE_START = ("PYTHON", "TORCH", "OMP_", "MKL_", "OPENBLAS_", "LD_", "LANG", "LC_", "MALLOC_")
# Of these: what a fork can be told, since it is read later, or says nothing to a process with one thread
LEFT = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHON_EXEC", "TORCHINDUCTOR_CACHE_DIR", "TORCHELASTIC_", "TORCH_NCCL_", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        "OMP_WAIT_POLICY")  # fmt: skip
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
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(_address())
    listener.listen(64)
    numbers = theirs.fileno(), listener.fileno()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forks; forks.serve{numbers}"
    child = subprocess.Popen([sys.executable, "-c", code], env=env, pass_fds=numbers, start_new_session=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
    theirs.close()
    listener.close()
    _server[:] = [ours, child]
    return ours


def _address() -> str:
    return f"\0forks of {os.getpid()}"  # no file: nothing is left of it


def can_fork(env: dict[str, str]) -> bool:
    """Whether a fork can have this environment."""
    return sys.platform == "linux" and not any(name.startswith(AT_THE_START) and not name.startswith(LEFT) for name in env)


def fork(argv: list[str], cwd: Path, base: dict[str, str], env: dict[str, str], out: int, err: int, python: str) -> Fork:
    """`python *argv` in a folder and a session of its own. `base` is the environment that the server starts with, `env` what comes on
    top (`can_fork`); standard output and error go to two open files; `python` is its `sys.executable`."""
    ours = _server[0] if _server else _start_server(base)
    status, theirs = os.pipe()
    request = marshal.dumps({"argv": argv, "cwd": str(cwd), "env": base | env, "python": python})
    with open(os.devnull) as nothing:
        socket.send_fds(ours, [request], [nothing.fileno(), out, err, theirs])
    os.close(theirs)
    return Fork(status)


# Few modules: those that are built in start in a hundredth of a second
CLIENT = """
import _signal, _socket, marshal, os, sys
python, base, words = {python!r}, {base!r}, sys.argv[1:]
asked = {{"argv": words[words[:1] == ["-u"]:], "cwd": os.getcwd(), "env": dict(os.environ), "python": {path!r}, "unbuffered": words[:1] == ["-u"]}}
kind = asked["argv"][0] if asked["argv"] else "-i"
others = [n for n in map(int, os.listdir("/proc/self/fd")) if n > 2 and os.access(f"/proc/self/fd/{{n}}", os.F_OK) and os.get_inheritable(n)]
base["LC_CTYPE"] = base.get("LC_CTYPE", "C.UTF-8")  # which Python sets itself where there is no locale
differs = [name for name, text in os.environ.items() if name.startswith({names!r}) and not name.startswith({left!r}) and base.get(name) != text]
if others or differs or not (kind in ("-c", "-m", "-") or os.path.isfile(kind)):
    os.execv(python, [python, *words])
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
server.connect({address!r})
status, theirs = os.pipe()
numbers = b"".join(n.to_bytes(4, sys.byteorder) for n in (0, 1, 2, theirs))
server.sendmsg([marshal.dumps(asked)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])
os.close(theirs)
told = open(status)
fork = int(told.readline())
def hand_on(number, _):
    try:
        os.kill(fork, number)
    except ProcessLookupError:  # it has just ended
        pass
for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGUSR1, _signal.SIGUSR2, _signal.SIGWINCH):
    _signal.signal(number, hand_on)
code = int(told.readline())
if code < 0:
    _signal.signal(-code, _signal.SIG_DFL) if -code not in (_signal.SIGKILL, _signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def interpreter(folder: Path, base: dict[str, str]) -> str:
    """A file that is called as Python is. What it is asked for is forked, with standard input, output and error as they are and the same
    file as `sys.executable`; signals are handed on, and the fork dies if it does. The real interpreter does what no fork can:
    options, an environment that is read at the start, further files that it inherits."""
    if sys.platform != "linux":
        return sys.executable
    if not _server:
        _start_server(base)
    path, client = folder / "python", folder / "client.py"
    kept = {name: text for name, text in base.items() if name.startswith(AT_THE_START)}
    client.write_text(CLIENT.format(python=sys.executable, base=kept, path=str(path), names=AT_THE_START, left=LEFT, address=_address()))
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(client))} "$@"\n')
    path.chmod(0o755)
    return str(path)


# -------------------------------------------------------------------------------------------------- the server


def serve(number: int, listener_number: int) -> None:
    """Fork what is asked for, and say how it ended, until the other end goes away."""
    atexit.register(_leave)  # the first: it is called last
    for name in MODULES.split():
        with contextlib.suppress(ImportError):
            __import__(name)
    gc.freeze()  # a collection would write to every page of the modules above: a copy of each, 0.1 s
    ours, listener = socket.socket(fileno=number), socket.socket(fileno=listener_number)
    statuses: dict[int, int] = {}
    clients: dict[socket.socket, int] = {}  # of `interpreter`: each is there as long as its fork
    woken, waker = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([ours, listener, woken, *clients], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _tell_who_ended(statuses)
        for client in clients.keys() & set(ready):  # it has ended
            if (pid := clients.pop(client)) in statuses:
                os.kill(pid, signal.SIGKILL)
            client.close()
        for asking in [s for s in (ours, listener) if s in ready]:
            source = asking if asking is ours else asking.accept()[0]
            request, files, _, _ = socket.recv_fds(source, 1 << 20, 4)
            if not request and source is ours:
                return
            if not request:
                source.close()
                continue
            asked = marshal.loads(request)
            with contextlib.suppress(OSError, SyntaxError, ValueError), warnings.catch_warnings():  # which the fork will tell
                warnings.simplefilter("error")
                _compiled(Path(asked["cwd"], asked["argv"][0]).read_bytes(), asked["argv"][0])  # here: for the next fork too
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                for f in (woken, waker, files[3], *statuses.values()):
                    os.close(f)
                for s in {ours, listener, source, *clients}:
                    s.close()
                try:
                    _become(asked, *files[:3])
                    _code.append(0)
                except SystemExit as stop:
                    _code.append(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
                    raise
                except Exception:
                    _code.append(1)
                    raise
                return
            for f in files[:3]:
                os.close(f)
            statuses[pid] = files[3]
            if source is not ours:
                clients[source] = pid
            with contextlib.suppress(BrokenPipeError):  # a client that has been killed meanwhile: the next round sees it
                os.write(files[3], f"{pid}\n".encode())


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


_code: list[int] = []  # of a fork, once its main module has ended


def _leave() -> None:
    """Leave out what an interpreter does after its exit handlers, but for flushing files: it takes torch's modules apart, 0.7 s."""
    if _code:
        with contextlib.suppress(Exception):  # then the interpreter says what is wrong
            for file in (sys.stdout, sys.stderr, *gc.get_objects()):
                if isinstance(file, io.IOBase) and not file.closed and file.writable():
                    file.flush()
            os._exit(_code[0] & 0xFF)


def _become(asked: dict, *files: int) -> None:
    """Run what is asked for as a fresh interpreter would; returns as its main module does, or raises what that raises."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for there, here in enumerate(files):
        os.dup2(here, there)
        os.close(here)
    out, err = (io.TextIOWrapper(open(file, "wb", buffering=size, closefd=False), stream.encoding, stream.errors, line_buffering=line, write_through=not size)
                for file, size, stream, line in ((1, 0 if asked.get("unbuffered") else -1, sys.stdout, os.isatty(1)), (2, -1, sys.stderr, True)))  # fmt: skip
    sys.stdout = sys.__stdout__ = out
    sys.stderr = sys.__stderr__ = err
    sys.executable = asked["python"]
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    tempfile.tempdir = None
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    kind, *rest = asked["argv"]
    del sys.path[:2], sys.modules["forks"]  # the tests' folder, and that of `-c`
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = ["-m", *rest[1:]]
        runpy._run_module_as_main(rest[0])
        return
    if kind in ("-c", "-"):
        source, name, sys.argv = (rest[0], "<string>", ["-c", *rest[1:]]) if kind == "-c" else (sys.stdin.read(), "<stdin>", ["-", *rest])
        sys.path.insert(0, "")
    else:
        source, name, sys.argv = Path(kind).read_bytes(), kind, [kind, *rest]
        main.__file__ = kind if os.path.isabs(kind) else os.path.join(os.getcwd(), kind)
        sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
    exec(_compiled(source, name), vars(main))
