"""Does another device or precision compute the same losses and gradients? One batch, against float32 and plain operations on the CPU.

    python bench/parity.py                  the default model, 2 sequences of the training split
    NUM_LAYERS=4 python bench/parity.py     settings as for train_gpt.py

The weights are drawn away from their initial zeros, so that every part takes part. Rows: the largest difference of a token's nats, the
difference of their mean as training sums it, and the smallest cosine between any parameter's gradient of the training loss and the
reference's. Plain: the operations as PyTorch has them (`Ops()`); fast: what the device does better (`fast_ops`), kernels among it.
Without a GPU the rows are the CPU's own.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command_line import OneLineParser, run_command  # noqa: E402

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


def compute(cfg: t.Config, device: str, x: torch.Tensor, y: torch.Tensor, fast: bool) -> Result:
    model, x, y = trained_looking_model(cfg).to(device), x.to(device), y.to(device)
    model.use(t.fast_ops(cfg, x.device) if fast else t.Ops())
    loss, mean = (part / x.numel() for part in model.parts.loss(model, x, y, cfg.z_loss))
    loss.backward()
    with torch.no_grad():
        nats = model(x, y)
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Result(nats.float().cpu(), mean.detach().float().cpu(), gradients)


def row(cfg: t.Config, case: tuple[str, str, bool], batch: tuple, reference: Result) -> str:
    device, precision, fast = case
    found = compute(dataclasses.replace(cfg, precision=precision), device, *batch, fast)
    cosines = {name: F.cosine_similarity(g.flatten(), reference.gradients[name].flatten(), dim=0).item()
               for name, g in found.gradients.items() if g.numel()}  # fmt: skip
    worst = min(cosines, key=cosines.__getitem__)
    differences = f"{(found.nats - reference.nats).abs().max():.2e} | {found.mean - reference.mean:+.2e}"
    return f"| {device} | {precision} | {'fast' if fast else 'plain'} | {differences} | {cosines[worst]:.6f} {worst} |"


def main() -> None:
    cfg = t.Config.from_env()
    batches = t.Batches(t.TokenStream(cfg, "train"), t.World())
    batch = batches.next(SEQUENCES, cfg.train_seq_len)
    reference = compute(dataclasses.replace(cfg, precision="fp32"), "cpu", *batch, fast=False)
    kinds = [("cuda", "fp32"), ("cuda", "bf16")] if torch.cuda.is_available() else [("cpu", "fp32"), ("cpu", "bf16")]
    cases = [(*kind, fast) for kind in kinds for fast in (False, True) if (*kind, fast) != ("cpu", "fp32", False)]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
    print(f"reference: cpu fp32 plain, mean {reference.nats.mean():.6f} nats over {reference.nats.numel()} tokens")
    print("| device | precision | operations | largest difference of a token | difference of the mean | smallest gradient cosine |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in cases:
        print(row(cfg, case, batch, reference), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main, t.UserError))
