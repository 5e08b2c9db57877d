"""Does another device or precision compute the same losses? One batch through one model, against float32 on the CPU.

    python bench/parity.py                  the default model, 2 sequences of the training split
    NUM_LAYERS=4 python bench/parity.py     settings as for train_gpt.py

The weights are drawn away from their initial zeros, so that every part takes part. Rows: the largest difference of a token's
nats, the difference of their mean, and the smallest cosine between any parameter's gradient and the reference's. The plain path
computes all logits by the plain operations; the training path is the loss that training minimizes, with what the device does
faster, kernels among it. Without a GPU the rows are the CPU's own bfloat16.
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


def nats_and_gradients(cfg: t.Config, device: str, x: torch.Tensor, y: torch.Tensor, training: bool) -> tuple[torch.Tensor, dict]:
    """Nats and every parameter's gradient of what is minimized, a token's share; float32, on the CPU.

    Plain: (B, T) nats of `model(x, y)`. Training: their mean, by the training loss with the device's operations and its z-loss.
    """
    model = trained_looking_model(cfg).to(device)
    x, y = x.to(device), y.to(device)
    if training:
        model.use(t.fast_ops(cfg, x.device))
        loss, nats = (part / x.numel() for part in model.parts.loss(model, x, y, cfg.z_loss))
    else:
        nats = model(x, y)
        loss = nats.mean()
    loss.backward()
    return nats.detach().float().cpu(), {name: p.grad.float().cpu() for name, p in model.named_parameters()}


def row(cfg: t.Config, case: tuple[str, str, bool], batch: tuple, reference: tuple[torch.Tensor, dict]) -> str:
    device, precision, training = case
    nats, gradients = nats_and_gradients(dataclasses.replace(cfg, precision=precision), device, *batch, training)
    cosines = {
        name: F.cosine_similarity(g.flatten(), reference[1][name].flatten(), dim=0).item() for name, g in gradients.items()
    }
    worst = min(cosines, key=cosines.__getitem__)
    largest = "" if training else f"{(nats - reference[0]).abs().max():.2e}"
    mean = nats.mean() - reference[0].mean()
    path = "training" if training else "plain"
    return f"| {device} | {precision} | {path} | {largest} | {mean:+.2e} | {cosines[worst]:.6f} {worst} |"


def main() -> None:
    cfg = t.Config.from_env()
    batches = t.Batches(t.TokenStream(cfg, "train"), t.World())
    batch = batches.next(SEQUENCES, cfg.train_seq_len)
    exact = dataclasses.replace(cfg, precision="fp32")
    references = {training: nats_and_gradients(exact, "cpu", *batch, training) for training in (False, True)}
    cases = [("cuda", "fp32"), ("cuda", "bf16")] if torch.cuda.is_available() else [("cpu", "bf16")]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
    print(f"reference: cpu fp32, mean {references[False][0].mean():.6f} nats over {references[False][0].numel()} tokens")
    print("| device | precision | path | largest difference of a token | difference of the mean | smallest gradient cosine |")
    print("|---|---|---|---|---|---|", flush=True)
    for training, reference in references.items():
        for case in cases:
            print(row(cfg, (*case, training), batch, reference), flush=True)


if __name__ == "__main__":
    main()
