"""Every tile of the matrix kernels compiled for three kinds of GPU, without one: registers, spilled bytes, shared memory.

    python bench/tiles.py            the table in docs/speed.md; a quarter of an hour on a core
    python bench/tiles.py --tiny     one tile, one kind of GPU

Of each kernel the worse of two sizes: 65,536 rows, 768 and 3,072 wide, and odd ones. Registers and spilled bytes are ptxas's,
of a thread; shared memory is a program's. A tile that needs more of it than there is cannot be launched: `tuned` leaves it out.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

from command_line import OneLineParser, start  # noqa: E402

SHARED_BYTES = {90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # that a program can have, by compute capability
KERNELS = "relu2, bf16", "relu2 gradient, bf16", "weight gradient, bf16", "relu2, 8 bits", "relu2 gradient, 8 bits"
SIZES = (65_536, 768, 3_072), (65_533, 752, 3_056)  # rows, width, hidden layer; 16 is the step of 8-bit rows


class CannotCompile(ValueError):
    """Triton is missing, or a compiler gives up; the text says why, in one line."""


def tile_name(tiles) -> str:
    return f"{tiles.m} x {tiles.n}, {tiles.warps} warps, {tiles.stages} stages{', persistent' if tiles.persistent else ''}"


def compile_tile(tiles, sizes: tuple[int, int, int]) -> list[list]:
    """[registers, spilled bytes, shared bytes, ""] of each of KERNELS with a tile; where a compiler gives up, its words."""
    import hopper
    import torch

    import train_gpt as t

    t.TILES, (rows, width, hidden) = [tiles], sizes
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype)
    x, h, up, columns = empty(rows, width), empty(rows, hidden), empty(hidden, width), empty(rows, 1, dtype=torch.float32)
    narrow, gradient, scales = up.to(torch.float8_e4m3fn), empty(rows, width, dtype=torch.float8_e5m2), torch.ones(2)
    calls = [
        lambda: t.relu2_product(x, up, None, x.dtype),
        lambda: t.relu2_gradient(x, up.T.contiguous(), h, columns, columns, None),
        lambda: t.split_weight_gradient(h, x, 5),
        lambda: t.relu2_product(x.to(torch.float8_e4m3fn), narrow, scales, x.dtype),
        lambda: t.relu2_gradient(gradient, narrow, h, columns, columns, scales),
    ]
    found = []
    for call in calls:
        t.TUNED.clear()
        hopper.compiled.clear()
        try:
            call()
            found.append([hopper.compiled[0].registers, hopper.compiled[0].spilled_bytes, hopper.compiled[0].shared_bytes, ""])
        except Exception as error:  # whatever the compilers raise
            found.append([0, 0, 0, f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"])
    return found


def compile_all(capability: int, tiny: bool) -> None:
    """The work of one process: a line of JSON a tile, each with figures a kernel and size."""
    import hopper

    import train_gpt as t

    hopper.start(capability)
    for tiles in [tiles for tiles in t.TILES if tiles.n == 128][-1:] if tiny else t.TILES:
        print(json.dumps([tile_name(tiles), [compile_tile(tiles, sizes) for sizes in (SIZES[1:] if tiny else SIZES)]]), flush=True)


def compiled_for(capability: int, tiny: bool) -> dict[str, list]:
    """Tile -> figures of each kernel: the worse of the sizes."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--capability", str(capability), *["--tiny"] * tiny]
        # torch is asked for one thread: nothing is computed
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotCompile((done.stderr.strip().splitlines() or ["no output"])[-1])
    found = dict(map(json.loads, done.stdout.splitlines()))
    return {name: [[max(values) for values in zip(*kernels, strict=True)] for kernels in zip(*sizes, strict=True)] for name, sizes in found.items()}


def cell(capability: int, figures: list) -> str:
    registers, spilled, shared, failure = figures
    if failure:
        return f"excluded: {failure}"
    text = f"{registers} registers, {spilled} B spilled, {shared / 1024:.0f} KB"
    return f"excluded: {shared / 1024:.0f} KB" if shared > SHARED_BYTES[capability] else text


def main() -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="one tile at odd sizes for compute capability 9.0")
    parser.add_argument("--capability", type=int, choices=SHARED_BYTES, help="lines of JSON for this one, in this process")
    args = parser.parse_args()
    if args.capability:
        compile_all(args.capability, args.tiny)
        return 0
    found = {capability: compiled_for(capability, args.tiny) for capability in ([90] if args.tiny else SHARED_BYTES)}
    print(f"| tile | kernel | {' | '.join(f'sm_{capability}a' for capability in found)} |\n|---|---|{'---|' * len(found)}")
    for tile, (i, kernel) in itertools.product(next(iter(found.values())), enumerate(KERNELS)):
        print(f"| {tile} | {kernel} | {' | '.join(cell(capability, tiles[tile][i]) for capability, tiles in found.items())} |")
    return 0


if __name__ == "__main__":
    start(main, CannotCompile)
