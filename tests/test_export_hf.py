"""tools/export_hf.py: what the real transformers loads has the artifact's logits; the file's bytes; refusals."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
from pathlib import Path

import export_hf
import pytest
import torch
from conftest import ROOT, tiny_model, tokens
from test_sample import CASES, damaged, drawn_model, run_folder  # noqa: F401
from test_scripts import CONFIG, RESULT

import train_gpt

EXPORTED = [case for case in CASES if "tversky" not in case and "fp8" not in case]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers: pip install -r requirements-extra.txt"
)


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """transformers keeps copies of modeling files: here, and asks no hub."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield transformers


def export(*arguments):
    """Exit code of export_hf.py."""
    try:
        return export_hf.main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code


def exported(model, folder, data_dir):
    """The folder of a model's export."""
    (folder / "m.ptz").write_bytes(train_gpt.save_artifact(model, model.cfg))
    assert export(folder / "m.ptz", folder / "out", "--tokenizer", data_dir / "tokenizer.model") == 0
    return folder / "out"


@pytest.mark.campaign
@needs_transformers
@pytest.mark.parametrize("case", EXPORTED)
@torch.no_grad()
def test_transformers_gives_the_artifacts_logits(case, tmp_path, data_dir, hub_cache):
    out = exported(drawn_model(CASES[case]), tmp_path, data_dir)
    model, _ = train_gpt.load_artifact((tmp_path / "m.ptz").read_bytes(), "fp32")
    theirs, info = hub_cache.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    ids = tokens(model, 2, model.cfg.score_window)
    expected, found = model.logits(model.hidden(ids)), theirs(ids).logits
    if model.cfg.act_quant == "none":
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-4 and expected.std() > 0.02
    else:  # a rounding of an activation to 8 bits may fall otherwise, by a level
        assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.campaign
@needs_transformers
@torch.no_grad()
def test_transformers_generates_and_scores(tmp_path, data_dir, hub_cache):
    model = tiny_model()
    theirs = hub_cache.AutoModelForCausalLM.from_pretrained(exported(model, tmp_path, data_dir), trust_remote_code=True)
    ids = tokens(model, 2, 12)
    model, _ = train_gpt.load_artifact((tmp_path / "m.ptz").read_bytes())
    text = ids
    for _ in range(5):
        text = torch.cat((text, model.logits(model.hidden(text))[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(theirs.generate(ids, max_new_tokens=5, do_sample=False), text)
    torch.testing.assert_close(theirs(ids, labels=ids).loss, model(ids[:, :-1], ids[:, 1:]).mean(), atol=1e-5, rtol=1e-5)
    filled = torch.nn.functional.pad(ids[:1], (0, 3))
    mask = (torch.arange(15) < 12).long()[None]
    torch.testing.assert_close(theirs(filled, attention_mask=mask).logits[:, :12], theirs(ids[:1]).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="padding at the beginning"):
        theirs(filled, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="33 tokens: expected at most 32"):
        theirs(tokens(model, 1, 33))


def read_safetensors(path):
    """name -> tensor, by the format's definition."""
    blob = path.read_bytes()
    (length,) = struct.unpack_from("<Q", blob)
    header, at = json.loads(blob[8 : 8 + length]), 8 + length
    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    found, ends = {}, []
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            data = torch.frombuffer(bytearray(blob[at + first : at + last] or b"\0" * 4), dtype=types[entry["dtype"]])
            found[name] = data[: (last - first) // data.itemsize].view(entry["shape"])
            ends.append(last)
    assert at % 8 == 0 and at + max(ends) == len(blob)
    return found


@pytest.mark.parametrize("settings", [{}, {"scale_storage": "fp16", "fp_storage": "FP16", "resid_mix": 0}, {"weight_quant": "none", "mtp_heads": 1}])
def test_the_file_holds_every_stored_parameter_exactly(settings, tmp_path, data_dir):
    model = tiny_model(**settings)
    out = exported(model, tmp_path, data_dir)
    loaded, _ = train_gpt.load_artifact((tmp_path / "m.ptz").read_bytes())
    stored = {name: p for name, _, p, _ in train_gpt.saved_parameters(loaded)}
    tensors = read_safetensors(out / "model.safetensors")
    assert tensors.keys() == stored.keys() and all(torch.equal(tensors[name].float(), p) for name, p in stored.items())
    assert {t.itemsize for t in tensors.values()} == {2}  # 16 bits hold all of it
    assert not (settings.get("mtp_heads") and [name for name in tensors if "mtp" in name])
    if importlib.util.find_spec("safetensors"):
        from safetensors.torch import load_file

        library = load_file(out / "model.safetensors")
        assert library.keys() == stored.keys() and all(torch.equal(library[name].float(), p) for name, p in stored.items())


def test_every_activation_of_the_trainer_is_exported():
    """Read from the source, so that it needs no transformers."""
    source = (ROOT / "tools/hf/modeling_ternary_gpt.py").read_text()
    table = re.search(r"^ACTIVATIONS = \{.*?\}", source, re.MULTILINE | re.DOTALL)[0]
    assert set(re.findall(r'"(\w+)":', table)) == {"relu2", *train_gpt.ACTIVATED}


def test_what_16_bits_cannot_hold_stays_in_float32():
    kinds = [export_hf.narrowest(torch.tensor([x])).dtype for x in (2.0**-100, 1 + 2**-10, 1 + 2**-20)]
    assert kinds == [torch.bfloat16, torch.float16, torch.float32]


def test_the_folder_is_complete_and_its_card_says_what_it_is(tmp_path, run_folder):  # noqa: F811
    """A folder of the name that is empty is taken; nothing else is left where it was made."""
    shutil.copytree(run_folder / "apart", tmp_path / "apart")
    (tmp_path / "out").mkdir()
    assert export(tmp_path / "apart/model.ptz", tmp_path / "out") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["apart", "out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "LICENSE", "README.md", "config.json", "model.safetensors", "modeling_ternary_gpt.py", "tokenizer.model",
    ]  # fmt: skip
    card = (tmp_path / "out/README.md").read_text()
    sha = hashlib.sha256((run_folder / "model.ptz").read_bytes()).hexdigest()
    for said in ("license: mit", sha, "pull request #640", "arXiv:2402.17764", "## Licence", "6,530 steps in 599 s", "1.1500 (sliding)", "[*[1]"):
        assert said in card, said
    assert f"data set `{Path(CONFIG['data_path']).name}`" in card and str(tmp_path) not in card and RESULT["gpu_name"] in card
    assert (tmp_path / "out/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (run_folder / "tokenizer.model").read_bytes()


def test_the_card_does_not_say_what_no_log_says(tmp_path, data_dir):
    assert "No log of this artifact's run was found" in (exported(tiny_model(), tmp_path, data_dir) / "README.md").read_text()


@pytest.mark.parametrize("arguments, said", [
    (["none.ptz", "out"], "none.ptz: No such file or directory"),
    (["damaged.ptz", "out"], "damaged.ptz: the artifact is damaged"),
    (["model.ptz", "apart"], "apart: is there; expected a name that is free, or an empty folder"),
    (["model.ptz", "model.ptz"], "model.ptz: is there; expected a name"),
    (["model.ptz", "no/out"], "no/out: there is no folder no"),
    (["model.ptz", "out", "--tokenizer", "model.ptz"], "--tokenizer model.ptz: not a SentencePiece model"),
    (["tversky.ptz", "out"], "tversky.ptz: ATTN_PROJ_TYPE=tversky: expected standard, which can be exported"),
    (["fp8.ptz", "out"], "fp8.ptz: ACT_QUANT=fp8: expected none or int8, which can be exported"),
    (["model.ptz"], "the following arguments are required: OUT"),
])  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(arguments, said, run_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    shutil.copytree(run_folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    Path("damaged.ptz").write_bytes(damaged(Path("model.ptz").read_bytes()))
    for name, settings in (("tversky", {"attn_proj_type": "tversky"}), ("fp8", {"act_quant": "fp8"})):
        model = tiny_model(**settings)
        Path(f"{name}.ptz").write_bytes(train_gpt.save_artifact(model, model.cfg))
    before = sorted(os.listdir())
    assert export(*arguments) == 2
    out, err = capsys.readouterr()
    assert said in err and ": error: " in err and err.count("\n") == 1 and out == ""
    assert sorted(os.listdir()) == before


def test_a_full_disk_leaves_no_half_folder(run_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_hf.shutil, "copyfile", no_space)
    assert export(run_folder / "model.ptz", tmp_path / "out") == 2 and "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
