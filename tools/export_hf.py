#!/usr/bin/env python3
"""A folder that transformers can load, from an artifact: weights, config, a small modeling file, tokenizer, card, licence.

    export_hf.py ARTIFACT OUT [--tokenizer MODEL]

    AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)     gives the artifact's logits, in float32

OUT must not be there, or be an empty folder. Nothing is sent anywhere. Weights are stored in 16 bits where those hold them
exactly (each tensor for itself), else in float32. The tokenizer is the SentencePiece model itself, for the package
sentencepiece: transformers' own classes would make another one of it. Models with Tversky layers or ACT_QUANT=fp8 are refused.
"""

import hashlib
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

from command_line import run_command, start
from model_files import ROOT, load_model, load_tokenizer, run_of
from run_logs import OneLineParser
from shard_io import UserError

MODELING = ROOT / "tools/hf/modeling_ternary_gpt.py"
OTHER_KINDS = {"attn_proj_type": "standard", "logit_head_type": "standard"}  # what the modeling file computes
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # safetensors' names

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [ternary, bitnet, parameter-golf]
---

# {name}

A language model of {params:,} parameters, {ternary:,} of them {kind}, exported from an artifact of {bytes:,} bytes
(SHA-256 `{sha}`) that `train_gpt.py` wrote. It continues text; it was trained on nothing else, follows no instructions, and
writes what its training text made likely.

```python
import sentencepiece, torch
from transformers import AutoModelForCausalLM

tokenizer = sentencepiece.SentencePieceProcessor(model_file="{name}/tokenizer.model")
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
ids = torch.tensor([[*{start}, *tokenizer.encode("Once")]])
print(tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=True)[0].tolist()))
```

`trust_remote_code` runs `modeling_ternary_gpt.py` of this folder: read it first. Texts may have {window:,} tokens. The
artifact holds a temperature, {temperature:.4f}, by which its logits are divided for the sliding score; here they are not.

## Training

{training}

Settings that define the model are in `config.json`, under `settings`.

## What it builds on

* BitNet b1.58 (arXiv:2402.17764): weights in -1, 0, 1 with a scale for each group
* OpenAI's Parameter Golf (https://github.com/openai/parameter-golf) and its pull request #640, whose design the default is
* NeoMuon after Muon (https://kellerjordan.github.io/posts/muon), U-Net skips and relu^2 (arXiv:2109.08668) of modded-nanogpt,
  grouped-query attention (arXiv:2305.13245), rotary positions with YaRN's spectrum (arXiv:2309.00071), QK-norm
  (arXiv:2010.04245)
* SentencePiece for the tokenizer

## Licence

Program and modeling file: MIT (LICENSE). The weights come from the training text named above, whose own terms hold for it.
"""


def narrowest(w):
    """The tensor in the first 16-bit type that holds all its values exactly, else in float32."""
    import torch

    return next((t for t in (w.to(torch.bfloat16), w.to(torch.float16)) if torch.equal(t.float(), w)), w)


def safetensors_bytes(tensors):
    """The file format of safetensors: the length of a JSON header (8 bytes), the header, the tensors one after another."""
    import torch

    header, chunks, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, t in tensors.items():
        data = t.reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = TYPES[str(t.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(t.shape), "data_offsets": [at, at + len(data)]}
        chunks.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(chunks)


def exportable(loaded):
    """UserError where the modeling file has no such layer."""
    cfg = loaded.cfg
    for name, value in OTHER_KINDS.items():
        if getattr(cfg, name) != value:
            raise UserError(f"{loaded.path}: {name.upper()}={getattr(cfg, name)}: expected {value}, which can be exported")
    if cfg.act_quant == "fp8":
        raise UserError(f"{loaded.path}: ACT_QUANT=fp8: expected none or int8, which can be exported")


def config_of(loaded, tensors):
    """config.json: the model's settings and what transformers asks for."""
    cfg = loaded.cfg
    settings = {name.lower(): getattr(cfg, name.lower()) for name in cfg.model_settings()}
    module = MODELING.stem
    return {"model_type": "ternary_gpt", "architectures": ["TernaryGPTForCausalLM"], "dtype": "float32", "window": cfg.score_window,
            "auto_map": {"AutoConfig": f"{module}.TernaryGPTConfig", "AutoModelForCausalLM": f"{module}.TernaryGPTForCausalLM"},
            "settings": settings, "shapes": {name: list(t.shape) for name, t in tensors.items()}}  # fmt: skip


def training_text(loaded):
    """What the run's log says of the training, where it is found."""
    run = run_of(loaded)
    if run is None or run.is_evaluation:
        return "No log of this artifact's run was found when it was exported: text, length and score of the training are not known."
    data, r = Path(run.config["data_path"]).name, run.result
    scores = ", ".join(f"{r[key]:.4f} ({label})" for key, label in (("roundtrip_val_bpb", "chunked"), ("sliding_val_bpb", "sliding")) if r.get(key))
    return (f"{r['steps']:,} steps in {r['train_time_s']:.0f} s on {run.hardware}, on the data set `{data}`; "
            f"bits per byte on held-out text: {scores}.")  # fmt: skip


def card(loaded, tokenizer, name, temperature):
    import train_gpt

    params, ternary = train_gpt.count_parameters(loaded.model)
    kind = {"ternary": "ternary", "binary": "binary", "none": "quantized"}[loaded.cfg.weight_quant]
    return CARD.format(name=name, params=params, ternary=ternary, kind=kind, bytes=len(loaded.blob), temperature=temperature,
                       sha=hashlib.sha256(loaded.blob).hexdigest(), start=tokenizer.start(), training=training_text(loaded),
                       window=loaded.cfg.score_window)  # fmt: skip


def export(loaded, tokenizer, out):
    """Write the folder, whole or not at all."""
    import train_gpt

    exportable(loaded)
    tensors = {name: narrowest(p.data) for name, _, p, _ in train_gpt.saved_parameters(loaded.model)}
    partial = Path(tempfile.mkdtemp(prefix=".partial.", dir=out.parent))
    try:
        (partial / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        (partial / "config.json").write_text(json.dumps(config_of(loaded, tensors), indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card(loaded, tokenizer, out.name, loaded.model.temperature.item()), encoding="utf-8")
        for source, name in ((MODELING, MODELING.name), (tokenizer.path, "tokenizer.model"), (ROOT / "LICENSE", "LICENSE")):
            shutil.copyfile(source, partial / name)
        partial.chmod(0o755)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parse_arguments(argv):
    parser = OneLineParser(__doc__)
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--tokenizer", metavar="MODEL", help="the SentencePiece model (found by itself where the run has it)")
    return parser.parse_args(argv)


def run(options):
    out = options.out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{options.out}: is there; expected a name that is free, or an empty folder")
    if not out.parent.is_dir():
        raise UserError(f"{options.out}: there is no folder {options.out.parent}")
    loaded = load_model(options.artifact)
    export(loaded, load_tokenizer(loaded, options.tokenizer), out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{options.out}: {size:,} bytes; AutoModelForCausalLM.from_pretrained({str(options.out)!r}, trust_remote_code=True)")


def main(argv=None):
    options = parse_arguments(argv)
    return run_command(lambda: run(options), UserError)


if __name__ == "__main__":
    start(main)
