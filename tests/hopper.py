"""Compile kernels for a GPU without one: `compiled` holds what each launch after `start()` compiled to."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime.jit import JITFunction


class Compiled(NamedTuple):
    name: str
    ptx: str
    shared_bytes: int
    spilled_bytes: int  # of a thread
    registers: int  # of a thread


class Driver:
    """What Triton asks a driver for before it compiles; a Hopper GPU unless `start` says otherwise."""

    capability = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

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
        capability = Driver.capability
        ptxas = [get_ptxas(capability).path, "-v", f"-arch={sm_arch_from_capability(capability)}", f.name, "-o", f.name + ".cubin"]
        text = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    spilled, registers = (int(re.search(words, text)[1]) for words in ("([0-9]+) bytes spill stores", "Used ([0-9]+) registers"))
    compiled.append(Compiled(self.__name__, ptx, kernel.metadata.shared, spilled, registers))


def start(capability: int = 90) -> None:
    """From now on kernels are compiled for this compute capability; one for a process, since Triton keeps what it knows."""
    Driver.capability = capability
    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Driver())
