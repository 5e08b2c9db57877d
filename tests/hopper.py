"""Compile kernels for a Hopper GPU without one: `compiled` holds what each launch after `start()` compiled to."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Compiled(NamedTuple):
    name: str
    ptx: str
    shared_bytes: int
    spilled_bytes: int  # of a thread


class Hopper:
    """What Triton asks a driver for before it compiles."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)


compiled: list[Compiled] = []
run = JITFunction.run


def compile_only(self: JITFunction, *args, warmup: bool, **kwargs) -> None:  # noqa: ARG001
    """A launch up to the driver: Triton's binder, its compiler, and ptxas."""
    kernel = run(self, *args, warmup=True, **kwargs)
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", f.name, "-o", f.name + ".cubin"]
        text = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    compiled.append(Compiled(self.__name__, ptx, kernel.metadata.shared, int(re.search("([0-9]+) bytes spill stores", text)[1])))


def start() -> None:
    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Hopper())
