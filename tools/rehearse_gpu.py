"""Runs of train_gpt.py on a device that computes nothing: see tools/rehearse_gpu.sh, which starts this file.

    python -S tools/rehearse_gpu.py MODE...      MODE: runs, graphs, faults, first or all

It works on a copy in OUT (data/rehearsal) in which EDITS are made. A name that is gone from train_gpt.py is reported.
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

from command_line import OneLineParser, read_preset, start  # noqa: E402

# What is replaced in the copy: no kernel writes a value, so nothing can be said of values. Each occurs once.
EDITS = [
    # the self-check still compares shapes
    ("        a, b = found.detach().float(), expected.detach().float()\n",
     '        if found.shape != expected.shape:\n            raise Differs(f"{what} has the shape {tuple(found.shape)}")\n        return 0.0\n'),
    ("if not max(errors) < 0.05:", "if len(errors) != len(expected):"),
    # the allocator that makes one of the other is left out here
    ("            except torch.cuda.OutOfMemoryError:\n", "            except torch.AcceleratorError:\n"),
    ("nats, targets = world.sum_(totals).tolist()", "nats, targets = world.sum_(totals).tolist()[0], val.num_targets"),
]  # fmt: skip

SHORT = {"ITERATIONS": "3", "WARMUP_STEPS": "2", "MAX_WALLCLOCK_SECONDS": "0", "VAL_MAX_TOKENS": "4096", "SLIDING_EVAL_STRIDE": "64"}
UNCOMPILED = {"COMPILE_MODE": "none"}
FEWER = {"NUM_LAYERS": "2", "TRAIN_BATCH_TOKENS": "65536"}  # kernels depend on the widths, and scans on the rows
RECURRENT = {"NUM_UNIQUE_LAYERS": "1", "RECURRENCE_FACTOR": "2"}  # of that depth
SMALL = {"NUM_LAYERS": "1", "TRAIN_BATCH_TOKENS": "8192", "TRAIN_SEQ_LEN": "512"}
# What a GPU computes otherwise than a preset asks for: in 8 bits with kernels of its own, with other attention, with loss scaling
PRECISIONS = [("ACT_QUANT", "fp8"), ("PRECISION", "fp32"), ("PRECISION", "fp16")]


class Failed(Exception):
    """A run that did not end as it should; the text says how."""


class Fault(NamedTuple):
    """Something that is broken, and what is expected to be switched off because of it."""

    off: set[str]
    code: str = ""  # at the end of train_gpt.py
    settings: dict[str, str] = UNCOMPILED
    flash: str = ""  # flash_attn_interface.py
    ptxas: bool = True  # whether Triton's assembler works
    attention: str = "PyTorch SDPA"  # what the attention's name begins with


# Triton takes an assembler that says its version, else its own
PTXAS = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'Cuda compilation tools, release 13.0, V13.0.88' && exit\necho 'ptxas fatal' >&2\nexit 255\n"
FLASH = "def flash_attn_func(q, k, v, causal, window_size):\n    "
FAULTS = {
    "a kernel that raises": Fault({"loss"}, "def fused_loss(*_):\n    raise RuntimeError('no kernel image is available for execution on the device')\n"),
    "an operation that raises backward": Fault({"qk"}, "def normed_rotated_backward(*_):\n    raise RuntimeError('an illegal memory access')\n"),
    "a kernel that cannot be launched": Fault({"mlp"}, "TILES = [Tiles(128, 256, 128, 8, 8, True)]  # of more shared memory than there is\n"),
    "an assembler that fails": Fault({"qk", "mlp", "loss"}, ptxas=False),
    "a compiler that fails": Fault({"qk", "mlp", "loss", "attention", "compile"}, settings={}, ptxas=False),
    "an attention library that cannot be imported": Fault(set(), flash="raise OSError('libcudart.so.12: cannot open shared object file')\n"),
    "an attention library of another signature": Fault({"FlashAttention-3"}, flash="def flash_attn_func(q, k, v, causal): ...\n"),
    "an attention library without kernels": Fault({"FlashAttention-3"}, flash=FLASH + "raise RuntimeError('no kernel image is available')\n"),
    "an attention library of another shape": Fault({"FlashAttention-3"}, flash=FLASH + "return q.transpose(1, 2)\n"),
    "an attention library that no graph takes": Fault({"FlashAttention-3"}, settings=SMALL, flash=FLASH + "print(len(q))\n    return q.clone()\n"),
}  # fmt: skip


def copy_project(to: Path, code: str = "") -> Path:
    """The project in `to` with EDITS made, and with `code` at the end of train_gpt.py."""
    shutil.rmtree(to, ignore_errors=True)
    for name in ("bench", "tools", "configs"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    (to / "train_gpt.py").write_text(edited((ROOT / "train_gpt.py").read_text(encoding="utf-8"), code), encoding="utf-8")
    return to


def edited(source: str, code: str = "") -> str:
    for old, new in EDITS:
        if source.count(old) != 1:
            raise Failed(f"train_gpt.py holds {old.strip()!r} {source.count(old)} times, not once: adapt EDITS in tools/rehearse_gpu.py")
        source = source.replace(old, new)
    program, end, last = source.rpartition('\nif __name__ == "__main__":\n')
    return program + code + end + last


def make_shards(folder: Path, vocab_size: int) -> dict[str, str]:
    """Shards of made-up words, with a tokenizer of this size, unless they are there; the settings that name them."""
    data = folder / f"words_sp{vocab_size}"
    if not (data / "manifest.json").is_file():
        draw, letters = random.Random(0), "etaoinshrdlucmfwyp"
        words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(12_000)]
        text = folder / "words.jsonl"
        text.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=200))}) + "\n" for _ in range(1500)))
        command = [sys.executable, "-S", "tools/prepare_data.py", "text", str(text), "--vocab-size", str(vocab_size), "--out", str(data)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"shards of {vocab_size} pieces: {done.stderr.strip()}")
    return {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")}


class Rehearsal:
    """Runs of the copy; `failures` counts those that did not end as they should."""

    def __init__(self, folder: Path, only: set[str]) -> None:
        self.folder, self.only, self.failures = folder, only, 0
        self.caches = {name: str(folder / "cache" / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        short = {"TRAIN_BATCH_TOKENS": "65536"}  # one micro-batch
        self.presets = {"default": {}} | {f"{name}={value}": {name: value} | short for name, value in PRECISIONS}
        self.presets |= {path.stem: read_preset(path) for path in sorted((ROOT / "configs").glob("*.env"))}

    def attempt(self, name: str, work) -> None:
        """`work()` says what it found, or raises Failed; a line of either."""
        if self.only and name.replace(" ", "_") not in self.only:
            return
        begin = time.monotonic()
        try:
            outcome = f"ok: {work()}"
        except Failed as error:
            outcome, self.failures = f"FAILED: {error}", self.failures + 1
        print(f"{name} | {time.monotonic() - begin:.0f} s | {outcome}", flush=True)

    def train(self, project: Path, name: str, settings: dict[str, str], path: str = "") -> dict:
        """The result line of a run, which is to end with 0; what it prints goes to a file."""
        data = make_shards(self.folder, int(settings.get("VOCAB_SIZE", 8192)))
        run = {"RUN_ID": re.sub(r"[ =]", "_", name), "ARTIFACT_PATH": str(self.folder / "model.ptz"), "LOG_DIR": str(self.folder / "logs")}
        python = {"PYTHONPATH": f"{path}:{os.environ['PYTHONPATH']}" if path else os.environ["PYTHONPATH"]}
        said = self.folder / f"{run['RUN_ID']}.txt"
        for passed in (self.folder / "data" / "compile_cache").glob("passed_*.json"):
            passed.unlink()  # each is to check itself
        with said.open("w") as out:
            done = subprocess.run([sys.executable, "-S", project / "train_gpt.py"], cwd=self.folder, stdout=out, stderr=subprocess.STDOUT,
                                  env=os.environ | self.caches | settings | data | run | python, check=False)  # fmt: skip
        lines = said.read_text(errors="replace").splitlines() or ["nothing"]
        if done.returncode or not lines[-1].startswith("result "):
            raise Failed(f"code {done.returncode}: {lines[-1]} ({said.name})")
        return json.loads(lines[-1].removeprefix("result "))

    def runs(self, **changed: str) -> None:
        """The default, in other precisions too, and every preset: nothing may be switched off, nothing compiled once the clock runs."""
        project = copy_project(self.folder / "project")
        for name, preset in self.presets.items():
            recurrent = RECURRENT if "NUM_LAYERS" in changed and "NUM_UNIQUE_LAYERS" in preset else {}
            settings = preset | SHORT | changed | recurrent
            self.attempt(name, lambda name=name, settings=settings: clean(self.train(project, name, settings)))

    def graphs(self) -> None:
        self.runs(**FEWER)

    def faults(self) -> None:
        for name, fault in FAULTS.items():
            self.attempt(name, lambda name=name, fault=fault: self.survived(name, fault))

    def survived(self, name: str, fault: Fault) -> str:
        """What is switched off is what is at fault, and the run has gone on to its end."""
        project = copy_project(self.folder / "broken", fault.code)
        settings = SHORT | SMALL | fault.settings
        if fault.flash:
            (project / "flash_attn_interface.py").write_text(fault.flash)
        if not fault.ptxas:
            (project / "ptxas").write_text(PTXAS)
            (project / "ptxas").chmod(0o755)
            settings |= {"TRITON_PTXAS_PATH": str(project / "ptxas")} | {cache: str(project / cache) for cache in self.caches}
        result = self.train(project, name, settings)
        off = result["kernels_off"]
        if off.keys() != fault.off or not result["attention"].startswith(fault.attention):
            raise Failed(f"switched off: {off or 'nothing'}; attention: {result['attention']}; expected {sorted(fault.off) or 'nothing'}")
        return "; ".join(f"{operation} off: {reason}" for operation, reason in off.items()) or f"attention: {result['attention']}"


    def first(self) -> None:
        self.attempt("gpu_queue.sh first", self.queue)

    def queue(self) -> str:
        """bench/gpu_queue.sh first, short, each part with ten times the time; its output lies in first/out. Each part has to leave its
        figures; the profile of a step, which counts kernels as they run, cannot be had here."""
        project, data = copy_project(self.folder / "first"), make_shards(self.folder, 8192)
        environment = {name: os.environ[name] for name in os.environ if name.startswith(("PYTHON", "LD_", "TRITON", "TORCH", "OMP"))}
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        (project / "python").write_text(f'#!/bin/sh\n{exports}exec {shlex.quote(sys.executable)} -S "$@"\n')
        (project / "python").chmod(0o755)
        paths = {name: os.path.relpath(path, project) for name, path in data.items()}
        settings = SMALL | paths | {"PYTHON": "./python", "OUT": "out", "LIMIT_S": "5400", "TRAIN_SECONDS": "5"}
        with (self.folder / "first.txt").open("w") as said:
            subprocess.run(["bash", "bench/gpu_queue.sh", "first"], cwd=project, stdout=said, stderr=subprocess.STDOUT,
                           env=os.environ | settings, check=False)  # fmt: skip
        parts = [json.loads(line) for line in (project / "out" / "first.jsonl").read_text().splitlines()]
        if bad := [part["name"] for part in parts if not well(part)]:
            raise Failed(f"{', '.join(bad)}: see first.txt")
        return f"{len(parts)} parts have left what they measured"


def well(part: dict) -> bool:
    """Whether a part has left what it measured, and failed at most at its profile."""
    figures = part.get("figures") or {"failed": {}}
    left = part.get("result") or part.get("figures") or part["name"] == "table"
    return bool(left) and (part["outcome"].startswith("ok, ") or [*figures["failed"]] == ["profile of this checkout"])


def clean(result: dict) -> str:
    """Nothing is switched off, and nothing was compiled late."""
    if result["kernels_off"]:
        raise Failed(f"switched off: {result['kernels_off']}")
    if result["late_graphs"]:
        raise Failed(f"{result['late_graphs']} graphs were compiled while the clock ran")
    return f"{','.join(result['kernels'])}; {result['attention']}"


def main() -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("modes", nargs="+", choices=["runs", "graphs", "faults", "first", "all"], metavar="MODE")
    modes = parser.parse_args().modes
    folder = Path(os.environ.get("OUT", ROOT / "data" / "rehearsal")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rehearsal = Rehearsal(folder, set(os.environ.get("ONLY", "").split()))
    for mode in ["runs", "faults", "graphs", "first"] if modes == ["all"] else modes:
        print(f"==== {mode}", flush=True)
        rehearsal.runs(**UNCOMPILED) if mode == "runs" else getattr(rehearsal, mode)()
    return bool(rehearsal.failures)


if __name__ == "__main__":
    start(main, Failed)
