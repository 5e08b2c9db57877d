"""bench/tiles.py and its table in docs/speed.md: every tile of the matrix kernels is compiled, or excluded by name."""

from __future__ import annotations

import itertools
import re

import pytest
import tiles
from conftest import ROOT

import train_gpt

PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8").partition("## Tiles of the matrix kernels")[2]
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
CELL = re.compile(r"(?:(\d+) registers, (\d+) B spilled|excluded:) ?,? ?(\d+) KB")


def test_every_tile_is_compiled_or_excluded_by_name_for_every_card():
    head, _, *rows = TABLE
    assert head[2:] == [f"sm_{capability}a" for capability in tiles.SHARED_BYTES]
    assert [row[:2] for row in rows] == [list(pair) for pair in itertools.product(map(tiles.tile_name, train_gpt.TILES), tiles.KERNELS)]
    for row in rows:
        for capability, text in zip(tiles.SHARED_BYTES, row[2:], strict=True):
            registers, spilled, kilobytes = CELL.fullmatch(text).groups()
            fits = int(kilobytes) << 10 <= tiles.SHARED_BYTES[capability]
            assert fits is (registers is not None), (row, text)
            assert registers is None or int(registers) <= 255 and (capability == 100 or spilled == "0"), (row, text)


@pytest.mark.parametrize("column, capability", enumerate(tiles.SHARED_BYTES, 2))
def test_each_kernel_has_a_tile_for_each_card(column, capability):
    """None of them goes without: `fastest_tiles` would raise, and the MLP be computed plainly."""
    for kernel in tiles.KERNELS:
        assert any(not row[column].startswith("excluded") for row in TABLE[2:] if row[1] == kernel), (kernel, capability)


@pytest.mark.parametrize("figures, text", [
    ([165, 0, 180_000, ""], "165 registers, 0 B spilled, 176 KB"), ([0, 0, 262_192, ""], "excluded: 256 KB"),
    ([0, 0, 0, "PTXASError: words"], "excluded: PTXASError: words"), ([1, 2, 227 << 10, ""], "1 registers, 2 B spilled, 227 KB"),
])  # fmt: skip
def test_a_cell_says_what_a_compiler_made_or_why_not(figures, text):
    assert tiles.cell(90, figures) == text


@pytest.mark.campaign
def test_the_table_is_what_the_compiler_says(capsys, monkeypatch):
    """One tile, for an H100: the figures of the page, which are the worse of two sizes, are no smaller; the shared memory is the same."""
    if f"Triton {pytest.importorskip('triton').__version__}:" not in PAGE:
        pytest.skip("another compiler, other figures")
    monkeypatch.setattr("sys.argv", ["tiles.py", "--tiny"])
    assert tiles.main() == 0
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()][2:]
    page = {tuple(row[:2]): CELL.fullmatch(row[2]).groups() for row in TABLE[2:]}
    assert len(found) == len(tiles.KERNELS)
    for tile, kernel, text in found:
        ours, theirs = CELL.fullmatch(text).groups(), page[tile, kernel]
        assert int(ours[0]) <= int(theirs[0]) and ours[1:] == theirs[1:], (tile, kernel)
