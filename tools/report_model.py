"""What tools/report.py shows of a model and of the text that it was scored on: its layers, and what each token costs.

This file is no command. It imports train_gpt.py, and with it PyTorch, where it is asked for a model.
"""

import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import command_line
import sample
from model_files import read_text
from shard_io import UserError, read_shard, shard_paths

BINS = 24  # of a histogram of scales
MOST_TOKENS = 32_768  # scored for the passages: seconds for the demo's model, minutes for one of full size
BATCH_TOKENS = 4096
PASSAGE_TOKENS, LEAST_TOKENS = 48, 24
PASSAGES = 4  # hardest, and as many easiest
SAMPLE_TOKENS, SAMPLE_SECONDS = 80, 300  # of each sample, at most
SHOWN_BITS = 16.0  # and more are shown alike


class Layer(NamedTuple):
    """A matrix of the model."""

    name: str
    shape: tuple
    storage: str  # ternary, table, ...
    zeros: float | None = None  # share; of ternary ones
    scales: list = ()  # how many groups' scales lie in each bin; empty groups are in none
    empty: int = 0  # groups of nothing but zeros, whose scale cannot be seen


class Layers(NamedTuple):
    matrices: list
    low: float  # of all scales
    high: float
    others: int  # parameters that are no matrices
    other_weights: int


class Unit(NamedTuple):
    """Text that stands together: a token, or the tokens whose bytes make up a character."""

    text: str
    bits: float


class Passage(NamedTuple):
    bits_per_byte: float
    units: list


def layers_of(model):
    """The Layers of a frozen model, in the artifact's order."""
    import train_gpt  # slow to import

    matrices, scales, others = [], {}, []
    for name, module, p, role in train_gpt.saved_parameters(model):
        if p.ndim != 2 or role.storage == "control":
            others.append(p.numel())
        elif role.storage != "ternary":
            matrices.append(Layer(name, tuple(p.shape), role.storage))
        else:
            groups = p.view(-1, module.group_size)  # a frozen weight is its codes times its group's scale
            found = groups.abs().amax(1)
            scales[name] = found[found > 0].log2()
            matrices.append(Layer(name, tuple(p.shape), "ternary", float((p == 0).float().mean()), [], int((found == 0).sum())))
    ends = [float(end) for s in scales.values() if len(s) for end in (s.min(), s.max())]
    low, high = (min(ends), max(ends)) if ends else (0.0, 0.0)
    matrices = [layer._replace(scales=scales[layer.name].histc(BINS, low, high or low + 1).int().tolist()) if layer.name in scales else layer
                for layer in matrices]  # fmt: skip
    return Layers(matrices, 2**low, 2**high, len(others), sum(others))


# -------------------------------------------------------------------------------------------------- passages


def held_out_tokens(folder):
    """The first tokens of the validation shards, as many as are scored."""
    ids, paths = [], shard_paths(Path(folder), "val")
    for path in paths:
        ids += read_shard(path)[: MOST_TOKENS + 1 - len(ids)].tolist()
    if not ids:
        raise UserError(f"{folder}: no fineweb_val_*.bin there")
    return ids


def text_tokens(path, tokenizer):
    """The first tokens of a text file, as one document."""
    ids = tokenizer.document(read_text(path))
    if len(ids) <= LEAST_TOKENS:
        raise UserError(f"{path}: {len(ids)} tokens, expected more than {LEAST_TOKENS}")
    return ids[: MOST_TOKENS + 1]


def token_bits(model, ids):
    """Bits of each token after the first, at temperature 1; windows overlap by half, so that each has text before it."""
    import torch

    import train_gpt

    tokens, count, window = torch.tensor(ids), len(ids) - 1, model.cfg.train_seq_len
    starts, firsts = train_gpt.window_plan(count, window, max(1, window // 2))
    jobs, bits = list(zip(starts.tolist(), firsts.tolist(), strict=True)), []
    size = max(1, BATCH_TOKENS // window)
    with torch.no_grad(), train_gpt.rounded_once(model):
        for i in range(0, len(jobs), size):
            batch = [tokens[start : start + window + 1] for start, _ in jobs[i : i + size]]
            rows = torch.stack(batch)  # windows are equally long; a text shorter than one is a single window
            nats = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            bits += [x for row, (_, first) in zip(nats.tolist(), jobs[i : i + size], strict=True) for x in row[first:]]
    return [x / math.log(2) for x in bits]


def passages_of(ids, bits, tokenizer):
    """Passages of PASSAGE_TOKENS tokens, none across the edge of a document, from the hardest to the easiest."""
    import torch

    tokens, table = torch.tensor(ids), tokenizer.table
    sizes, edges = table.count(tokens[:-1], tokens[1:]).tolist(), table.edge[tokens].tolist()
    found, begin = [], 1
    for end in range(1, len(ids) + 1):
        if end == len(ids) or edges[end] or end - begin == PASSAGE_TOKENS:
            size = sum(sizes[begin - 1 : end - 1])
            if end - begin >= LEAST_TOKENS and size:
                units = units_of([tokenizer.pieces.id_to_piece(i) for i in ids[begin:end]], bits[begin - 1 : end - 1])
                found.append(Passage(sum(bits[begin - 1 : end - 1]) / size, units))
            begin = end + (end < len(ids) and edges[end])
    return sorted(found, key=lambda passage: -passage.bits_per_byte)


def units_of(pieces, bits):
    """Units of a row of pieces. A piece spelled <0xE2> is a byte; bytes that follow each other are one unit."""
    units, pending, cost = [], b"", 0.0
    for piece, b in zip([*pieces, ""], [*bits, 0.0], strict=True):
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        if is_byte:
            pending, cost = pending + bytes([int(piece[3:5], 16)]), cost + b
            continue
        if pending:
            units.append(Unit(pending.decode(errors="replace"), cost))
            pending, cost = b"", 0.0
        if piece:
            units.append(Unit(piece.replace("\u2581", " "), b))
    return units


def extremes(passages):
    """(hardest, easiest) of passages in that order; no passage is both."""
    count = min(PASSAGES, len(passages) // 2)
    return passages[:count], passages[len(passages) - count :][::-1]


# -------------------------------------------------------------------------------------------------- samples


def samples_of(loaded, tokenizer, prompts):
    """(prompt, what the model writes after it) with the seeds 1, 2, ...; UserError where there is nothing to begin with."""
    import torch

    import train_gpt

    options = sample.parse_arguments(["artifact", "--tokens", str(SAMPLE_TOKENS)])
    model = copy.deepcopy(loaded.model)  # the sampler's cache changes how it computes
    with train_gpt.rounded_once(model):
        context = sample.Context(model)
        for seed, prompt in enumerate(prompts, 1):
            if not tokenizer.document(prompt):
                raise UserError(f"{tokenizer.path}: no piece begins a document; --prompt TEXT gives one")
            context.restart()
            until, text = time.monotonic() + SAMPLE_SECONDS, ""
            for piece in sample.continuation(context, tokenizer, prompt, options, torch.Generator().manual_seed(seed)):
                text += piece
                if time.monotonic() > until:
                    break
            yield prompt, text


if __name__ == "__main__":
    command_line.not_a_command("tools/report.py")
