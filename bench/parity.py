"""Does another device or precision compute the same losses? One batch through one model, against float32 on the CPU.

    python bench/parity.py                  the default model, 2 sequences of the training split
    NUM_LAYERS=4 python bench/parity.py     settings as for train_gpt.py

The weights are drawn away from their initial zeros, so that every part takes part. Rows: the largest difference of a token's
nats, the difference of their mean, and the smallest cosine between any parameter's gradient and the reference's. Without a
GPU the row is the CPU's own bfloat16.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as t

SEQUENCES = 2


def trained_looking_model(cfg: t.Config) -> t.GPT:
    """The model of `cfg` with noise on every parameter: output projections start at 0 and would hide what feeds them."""
    torch.manual_seed(cfg.seed)
    model = t.GPT(cfg)
    with torch.no_grad():
        for _, _, p, role in t.parameter_owners(model):
            p.add_(torch.randn_like(p) * (0.1 if role.storage == "control" else 0.02))
    return model


def nats_and_gradients(cfg: t.Config, device: str, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(B, T) nats of the plain forward pass, and every parameter's gradient of their mean; float32, on the CPU."""
    model = trained_looking_model(cfg).to(device)
    nats = model(x.to(device), y.to(device))
    nats.mean().backward()
    return nats.detach().float().cpu(), [p.grad.float().cpu() for p in model.parameters()]


def main() -> None:
    cfg = t.Config.from_env()
    batches = t.Batches(t.TokenStream(cfg, "train"), t.World())
    x, y = batches.next(SEQUENCES, cfg.train_seq_len)
    reference, gradients = nats_and_gradients(dataclasses.replace(cfg, precision="fp32"), "cpu", x, y)
    cases = [("cuda", "fp32"), ("cuda", "bf16")] if torch.cuda.is_available() else [("cpu", "bf16")]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
    print(f"reference: cpu fp32, mean {reference.mean():.6f} nats over {reference.numel()} tokens")
    print("| device | precision | largest difference of a token | difference of the mean | smallest gradient cosine |\n|---|---|---|---|---|")
    for device, precision in cases:
        nats, grads = nats_and_gradients(dataclasses.replace(cfg, precision=precision), device, x, y)
        cosine = min(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in zip(gradients, grads, strict=True))
        worst, mean = (nats - reference).abs().max(), nats.mean() - reference.mean()
        print(f"| {device} | {precision} | {worst:.2e} | {mean:+.2e} | {cosine:.6f} |")


if __name__ == "__main__":
    main()
