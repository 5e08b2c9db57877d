"""A ternary GPT trained by train_gpt.py, for transformers (trust_remote_code=True).

The forward pass of the trained model in plain PyTorch and float32, all positions at once. `config.settings` holds the model's
settings as train_gpt.py names them; parameters keep their names. Weights are stored in 16 bits where those hold them exactly.
Generation computes the whole text for every token: there is no cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class TernaryGPTConfig(PretrainedConfig):
    """settings: {name: value}; shapes: {parameter: shape}; window: the most tokens that the model has positions for."""

    model_type = "ternary_gpt"

    def __init__(self, settings=None, shapes=None, window=0, **rest):
        self.settings, self.shapes, self.window = settings or {}, shapes or {}, window
        self.vocab_size = self.settings.get("vocab_size", 0)
        self.hidden_size, self.num_hidden_layers = self.settings.get("model_dim", 0), self.settings.get("num_layers", 0)
        self.num_attention_heads, self.max_position_embeddings = self.settings.get("num_heads", 0), window
        super().__init__(**{"tie_word_embeddings": False, "use_cache": False} | rest)


def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def to_8_bits(x):
    """Each token's channels on 255 levels of its largest magnitude."""
    level = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
    return (x / level).round().clamp(-127, 127) * level


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS = {"relu2": lambda x: F.relu(x).square(), "relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "swiglu": swiglu,
               "leaky_relu2": lambda x: torch.where(x >= 0, x, x / 4) * x}  # fmt: skip


class TernaryGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TernaryGPTConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        for name, shape in config.shapes.items():
            *path, last = name.split(".")
            owner = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.post_init()

    def _init_weights(self, module):
        """All weights are in the file."""

    def has(self, name):
        return name in self.config.shapes

    def matrix(self, name, x, normed=False):
        """x times a matrix of a block, its input normed or rounded as the settings say."""
        s = self.config.settings
        if s["input_norm"] == "all" or normed and s["input_norm"] == "outputs":
            x = rms_norm(x)
        return F.linear(to_8_bits(x) if s["act_quant"] == "int8" else x, self.get_parameter(name + ".weight"))

    def embedded(self, ids):
        x = F.embedding(ids, self.get_parameter("table.weight"))
        if self.has("table.previous.weight"):
            x = x + F.embedding(F.pad(ids[:, :-1], (1, 0)), self.get_parameter("table.previous.weight"))
        if self.has("table.smearing.gate"):
            n, gate = rms_norm(x), self.get_parameter("table.smearing.gate")
            share = self.get_parameter("table.smearing.amount") * (n[..., : len(gate)] @ gate).sigmoid()[..., None]
            x = n + share * F.pad(n[:, :-1], (0, 0, 1, 0))
        x = rms_norm(F.linear(x, self.get_parameter("embed_in.weight")) if self.has("embed_in.weight") else x)
        if self.config.settings["position"] != "radial":
            return x
        return x + F.linear(self.radial_features(ids), self.get_parameter("embed_norm.weight"))

    def radial_features(self, ids):
        """Positions as points of a golden spiral, (T, 4)."""
        s, i = self.config.settings, torch.arange(self.config.settings["radial_bits"], device=ids.device)
        bits = (torch.arange(ids.size(1), device=ids.device)[:, None] >> i & 1).double()
        length, angle = s["radial_alpha"] * ((1 + 5**0.5) / 2) ** i.double(), 2 * math.pi * i.double() / s["radial_bits"]
        z = torch.complex(bits @ (length * angle.cos()), bits @ (length * angle.sin()))
        return torch.stack((z.real, z.imag, z.abs(), z.angle()), -1).float()

    def rotated(self, x):
        """(B, T, H, C): channels i and i + C/2 turn by an angle."""
        s = self.config.settings
        if s["position"] != "rope":
            return x
        i = torch.arange(0, x.size(-1), 2, dtype=torch.float64, device=x.device) / x.size(-1)
        frequency = s["rope_base"] ** -i
        if s["rope_type"] == "yarn":
            frequency = frequency / (1 + ((i - 0.25) / 0.75).clamp(0, 1) * (s["yarn_max_len"] / s["train_seq_len"] - 1))
        angle = torch.outer(torch.arange(x.size(1), dtype=torch.float64, device=x.device), frequency)[:, None]
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

    def attend(self, q, k, v):
        """Causal attention, to ATTENTION_WINDOW tokens at most: (B, T, H | K | K, C) -> (B, T, H, C)."""
        length, window = q.size(1), self.config.settings["attention_window"]
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        mask = mask.triu(1 - window) if window else mask
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    def attention(self, block, x, exclusive):
        s, name = self.config.settings, f"blocks.{block}.attention."
        if self.has(name + "qkv.weight"):
            qkv = self.matrix(name + "qkv", x)
        else:
            qkv = torch.cat([self.matrix(f"{name}qkv.parts.{i}", x) for i in range(3)], dim=-1)
        qkv = qkv.unflatten(-1, (-1, s["model_dim"] // s["num_heads"]))
        q, k, v = qkv.split((s["num_heads"], s["num_kv_heads"], s["num_kv_heads"]), dim=2)
        q, k = self.rotated(rms_norm(q)) * self.get_parameter(name + "q_gain")[:, None], self.rotated(rms_norm(k))
        if s["key_offset"]:  # the upper channels of each half are those of the position before
            half, before = k.size(-1) // 2, torch.cat((k[:, :1], k[:, :-1]), 1)
            k = torch.where(torch.arange(2 * half, device=k.device) % half < (half + 1) // 2, k, before)
        if s["diff_attn"]:
            a, b = (self.attend(*half) for half in zip(*(t.chunk(2, dim=-1) for t in (q, k, v)), strict=True))
            y = torch.cat((a - 0.5 * b, a + 0.5 * b), dim=-1)
        else:
            y = self.attend(q, k, v)
        if exclusive:
            y, own = y.unflatten(2, (v.size(2), -1)), F.normalize(v, dim=-1).unsqueeze(3)
            y = (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)
        return self.matrix(name + "out", y.flatten(2), normed=True)

    def mlp(self, block, x):
        groups, activation = self.config.settings["mlp_groups"], ACTIVATIONS[self.config.settings["activation"]]
        names = [f"blocks.{block}.mlp.groups.{i}." for i in range(groups)] or [f"blocks.{block}.mlp."]
        parts = zip(names, x.chunk(len(names), dim=-1), strict=True)
        return torch.cat([self.matrix(n + "down", activation(self.matrix(n + "up", part)), normed=True) for n, part in parts], dim=-1)

    def block(self, i, x, x0, exclusive):
        get = lambda name: self.get_parameter(f"blocks.{i}.{name}")
        if self.config.settings["resid_mix"]:
            x = get("stream_mix")[0] * x + get("stream_mix")[1] * x0
        h = rms_norm(x)
        if self.has(f"blocks.{i}.attn_scale"):
            x = x + get("attn_scale") * self.attention(i, h, exclusive)
        x = x + get("mlp_scale") * self.mlp(i, h if self.config.settings["parallel_blocks"] else rms_norm(x))
        if self.has(f"blocks.{i}.smear.gate"):
            count = torch.arange(1, x.size(1) + 1, device=x.device)[:, None]
            x = x + get("smear.gate").tanh() * (x.cumsum(1) / count - x)
        return x

    def blocks_in_order(self, x0):
        """The blocks as often as the settings say, the second half of the layers with the outputs of the first."""
        s, x, kept = self.config.settings, x0, []
        blocks, half = s["num_unique_layers"] or s["num_layers"], s["num_layers"] // 2 * s["unet"]
        repeats = s["eval_depth_recurrence"] or max(1, s["training_depth_recurrence"])
        for i in range(s["num_layers"]):
            if half <= i < 2 * half:
                x = x + self.get_parameter("skip_weights")[i - half] * kept.pop()
            for _ in range(repeats):
                x = self.block(i % blocks, x, x0, i % blocks >= blocks - s["xsa_last_n"])
            if i < half:
                kept.append(x)
        return x

    def refined(self, x):
        """The normed output, with a causal convolution over the last positions where the model has one."""
        x = rms_norm(x)
        if not self.has("final_norm.gate"):
            return x
        kernel = self.config.settings["refiner_kernel"]
        padded = F.pad(x, (0, 0, kernel - 1, 0))
        shifted = torch.cat([padded[:, i : i + x.size(1)] for i in range(kernel)], dim=-1)
        return x + self.get_parameter("final_norm.gate").tanh() * rms_norm(self.matrix("final_norm.conv", shifted))

    def logits(self, h):
        s = self.config.settings
        table = self.get_parameter("output.weight" if self.has("output.weight") else "table.weight")
        if self.has("output.correction.weight"):
            table = table + self.get_parameter("output.correction.weight")
        h = F.linear(h, self.get_parameter("embed_out.weight")) if self.has("embed_out.weight") else h
        u, cap = (F.linear(h, table) + self.get_parameter("vocab_bias")) / s["logit_softcap"], s["logit_softcap"]
        if s["softcap_type"] == "tanh":
            return cap * u.tanh()
        u = u.clamp(-2, 2)
        return cap * (u * (1 - u**2 / 3 + u**4 / 15)).clamp(-1, 1)

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """Logits (B, T, V). Texts of a batch may be filled up at their end, never at their beginning."""
        if input_ids.size(1) > self.config.window:
            raise ValueError(f"{input_ids.size(1)} tokens: expected at most {self.config.window}, the model's window")
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("attention_mask: padding at the beginning of a text; expected it at the end (padding_side='right')")
        logits = self.logits(self.refined(self.blocks_in_order(self.embedded(input_ids))))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        """The whole text every time, whatever a generation config says of caches."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}
