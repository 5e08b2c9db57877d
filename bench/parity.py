"""Does another device or precision compute the same losses and gradients? One batch, against float32 and plain operations on the CPU.

    python bench/parity.py                  the default model, 2 sequences of the training split
    NUM_LAYERS=4 python bench/parity.py     settings as for train_gpt.py

The weights are drawn away from their initial zeros, so that every part takes part. Rows: the largest difference of a token's nats, the
difference of their mean as training sums it, and of any parameter's gradient of the training loss the smallest cosine with the
reference's, and the ratio of their norms that is furthest from 1. Plain: the operations as PyTorch has them (`Ops()`); fast: what the device does better (`fast_ops`), kernels among it;
compiled: fast, as one graph of the training loss and one of the score, as a run has them (COMPILE_MODE, on a GPU). What fails
shows as a row. Without a GPU the rows are the CPU's own.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command_line import OneLineParser, start  # noqa: E402

if __name__ == "__main__":
    OneLineParser(__doc__).parse_args()  # -h and mistakes are answered before PyTorch is imported, which takes seconds

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train_gpt as t  # noqa: E402

SEQUENCES = 2


def trained_looking_model(cfg: t.Config) -> t.GPT:
    """The model of `cfg` with noise on every parameter: output projections start at 0 and would hide what feeds them."""
    torch.manual_seed(cfg.seed)
    model = t.GPT(cfg)
    with torch.no_grad():
        for _, _, p, role in t.parameter_owners(model):
            p.add_(torch.randn_like(p) * (0.1 if role.storage == "control" else 0.02))
    return model


class Result(NamedTuple):
    """Of one batch; float32, on the CPU."""

    nats: torch.Tensor  # (B, T), as evaluation has them
    mean: torch.Tensor  # (), as training sums it
    gradients: dict[str, torch.Tensor]  # of the training loss, a token's share


WAYS = "plain", "fast", "compiled"


def compute(cfg: t.Config, device: str, x: torch.Tensor, y: torch.Tensor, way: str) -> Result:
    """What `way` makes of a batch."""
    model, x, y = trained_looking_model(cfg).to(device), x.to(device), y.to(device)
    model.use(t.Ops() if way == "plain" else t.fast_ops(cfg, x.device))
    world = t.World(device=x.device)
    graph = (lambda function: t.compiled(function, cfg, world)) if way == "compiled" else lambda function: function
    one = torch.ones((), device=x.device)
    with t.plain_attention(x.device) if way == "plain" else t.attention_backends(x.device):
        loss, mean = (part / x.numel() for part in graph(model.parts.loss)(model, x, y, cfg.z_loss))
        loss.backward()
        with torch.no_grad():
            nats = graph(t.score_windows)(model, x, y, y.size(1), one)
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Result(nats.float().cpu(), mean.detach().float().cpu(), gradients)


def row(cfg: t.Config, case: tuple[str, str, str], batch: tuple, reference: Result) -> str:
    device, precision, way = case
    try:
        found = compute(dataclasses.replace(cfg, precision=precision), device, *batch, way)
    except Exception as error:  # of a compiler or a driver; the other rows may still be had
        return f"| {device} | {precision} | {way} | FAILED {type(error).__name__}: {(str(error).splitlines() or ['?'])[0]} | | | |"
    cosines, norms = {}, {}
    for name, expected in reference.gradients.items():
        g = found.gradients.get(name, torch.zeros_like(expected))  # without a gradient: cosine 0, norm 0
        if g.numel():
            cosines[name] = F.cosine_similarity(g.flatten(), expected.flatten(), dim=0).item()
            norms[name] = (g.norm() / expected.norm()).item()
    worst, furthest = min(cosines, key=cosines.__getitem__), max(norms, key=lambda name: abs(norms[name] - 1))
    differences = f"{(found.nats - reference.nats).abs().max():.2e} | {found.mean - reference.mean:+.2e}"
    return f"| {device} | {precision} | {way} | {differences} | {cosines[worst]:.6f} {worst} | {norms[furthest]:.4f} {furthest} |"


def cases() -> list[tuple[str, str, str]]:
    """(device, precision, way) of the rows; the reference is none of them. A CPU compiles nothing."""
    gpu = torch.cuda.is_available()
    kinds = [("cuda", "fp32"), ("cuda", "bf16")] if gpu else [("cpu", "fp32"), ("cpu", "bf16")]
    return [(*kind, way) for kind in kinds for way in (WAYS if gpu else WAYS[:2]) if (*kind, way) != ("cpu", "fp32", "plain")]


def main() -> int:
    cfg = t.Config.from_env()
    batches = t.Batches(t.TokenStream(cfg, "train"), t.World())
    batch = batches.next(SEQUENCES, cfg.train_seq_len)
    reference = compute(dataclasses.replace(cfg, precision="fp32"), "cpu", *batch, "plain")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
    print(f"reference: cpu fp32 plain, mean {reference.nats.mean():.6f} nats over {reference.nats.numel()} tokens")
    print("| device | precision | operations | largest difference of a token | difference of the mean | smallest gradient cosine | its norm, furthest from 1 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = 0
    for case in cases():
        line = row(cfg, case, batch, reference)
        failed += " FAILED " in line
        print(line, flush=True)
    return bool(failed)


if __name__ == "__main__":
    start(main, t.UserError)
