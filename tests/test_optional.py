"""Optional systems: off they leave nothing behind; on, each is what its definition says, is trained, causal, and comes back exactly."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config, tiny_model

from train_gpt import GPT, Config, as_stored, block_order, load_artifact, rms_norm, save_artifact


def tokens(model, batch=2, seed=0):
    torch.manual_seed(seed)
    return torch.randint(model.cfg.vocab_size, (batch, model.cfg.train_seq_len))


def test_depth_recurrence_repeats_each_block_in_a_row():
    """Written out: skips are pushed once after the repeats of a block and popped once before them."""
    for layers, repeats in ((3, 2), (4, 3)):
        model = tiny_model(num_layers=layers, training_depth_recurrence=repeats, eval_depth_recurrence=1)
        x = tokens(model)
        x0 = h = rms_norm(model.embed_in(model.table.stored(torch.float32)[x]))
        outputs, half = [], layers // 2
        for i in range(layers):
            if half <= i < 2 * half:
                h = h + as_stored(model.skip_weights)[i - half] * outputs[2 * half - 1 - i]
            for _ in range(repeats):
                h = model.blocks[i](h, x0)
            outputs.append(h)
        torch.testing.assert_close(model.hidden(x, training=True), rms_norm(h), rtol=0, atol=0)
        once = tiny_model(num_layers=layers)
        torch.testing.assert_close(model.hidden(x), once.hidden(x), rtol=0, atol=0)


@pytest.mark.parametrize(("training", "evaluation", "passes"), [(0, 0, (1, 1)), (1, 1, (1, 1)), (3, 0, (3, 3)), (3, 1, (3, 1)), (0, 2, (1, 2))])
def test_evaluation_takes_its_own_depth_or_that_of_training(training, evaluation, passes):
    cfg = tiny_config(training_depth_recurrence=training, eval_depth_recurrence=evaluation)
    assert tuple(len(block_order(cfg, mode)) // cfg.num_layers for mode in (True, False)) == passes


def test_without_unet_and_mix_their_parameters_are_gone():
    model = tiny_model(unet=0, resid_mix=0)
    x = tokens(model)
    assert model.skip_weights.numel() == 0 and all(block.resid_mix.numel() == 0 for block in model.blocks)
    h = rms_norm(model.embed_in(model.table.stored(torch.float32)[x]))
    for block in model.blocks:
        h = h + as_stored(block.attn_scale) * block.attention(rms_norm(h))
        h = h + as_stored(block.mlp_scale) * block.mlp(rms_norm(h))
    torch.testing.assert_close(model.hidden(x), rms_norm(h), rtol=0, atol=0)


def test_the_header_of_an_artifact_names_an_option_only_where_it_is_on():
    blob = save_artifact(tiny_model(unet=0), tiny_config(unet=0))
    assert b"UNET=False" in blob and b"RESID_MIX" not in blob and load_artifact(blob)[1].unet is False
    assert GPT(Config(num_layers=2, model_dim=128, vocab_size=64)).skip_weights.numel() == 128
