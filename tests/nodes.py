"""Two hosts on one machine: network namespaces with a cable between them, torchrun on each. For test_nodes.py and campaign.py."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT, clean_env, family

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Hosts:
    """Names of the two namespaces; each has one end of the cable, of the same name."""

    def __init__(self) -> None:
        self.names = tuple(f"tg{os.getpid()}{end}" for end in "ab")

    def link(self, state: str) -> None:
        """The cable "up" or "down"."""
        ip("-n", self.names[0], "link", "set", self.names[0], state)

    def start(self, host: int, folder: Path, env: dict[str, str], *, nodes: int = 2, processes: int = 2, script: bool = False) -> subprocess.Popen:
        """torchrun of one host in a folder, by examples/two_nodes.sh if `script`; its output in `out` and `err` there."""
        folder.mkdir(parents=True, exist_ok=True)
        # both have one host name, so addresses and the store's place are said
        own = [f"--rdzv-conf=is_host={1 - host}", f"--local-addr={ADDRESSES[host]}", "--monitor-interval=0.1"]
        words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
                 f"--rdzv-endpoint={ADDRESSES[0]}:29700", "--max-restarts=0", *own, str(ROOT / "train_gpt.py")]  # fmt: skip
        if script:
            words = ["bash", str(ROOT / "examples/two_nodes.sh"), *own]
        clean = clean_env()
        clean |= {"HEAD": ADDRESSES[0], "PORT": "29700", "NODES": str(nodes), "GPUS": str(processes), "RESTARTS": "0", "TRAIN_PYTHON": sys.executable}
        clean |= {"GLOO_SOCKET_IFNAME": self.names[host], "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(folder / "out", "ab") as out, open(folder / "err", "ab") as err:
            return subprocess.Popen(["ip", "netns", "exec", self.names[host], *words], cwd=folder, env=clean | env, stdout=out, stderr=err,
                                    start_new_session=True)  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@contextlib.contextmanager
def hosts() -> Iterator[Hosts]:
    """OSError, with what the kernel or the system says, where there can be no namespaces."""
    made = Hosts()
    a, b = made.names
    try:
        ip("netns", "add", a)
        ip("netns", "add", b)
        ip("link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
        for name, address in zip(made.names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.SubprocessError) as error:
        remove(made)
        raise OSError(f"no network namespaces here: {(getattr(error, 'stderr', None) or str(error)).strip()}") from None
    try:
        yield made
    finally:
        remove(made)


def remove(made: Hosts) -> None:
    for name in made.names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20) if Path(f"/run/netns/{name}").exists() else None


def wait_all(children: list[subprocess.Popen], limit_s: float) -> list[int | None]:
    """Exit codes; None for what had to be ended, with all that it started."""
    until = time.monotonic() + limit_s
    codes: list[int | None] = []
    for child in children:
        try:
            codes.append(child.wait(max(0.1, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    for child, code in zip(children, codes, strict=True):
        if code is None:
            for pid in family(child.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            child.wait()
    return codes
