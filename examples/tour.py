# %% [markdown]
# # A tour of train_gpt.py
#
# From `import train_gpt` to a model that writes, in a few minutes on any machine: two CPU cores will do, a GPU is used
# where there is one. It runs as a notebook (`examples/tour.ipynb`, in Jupyter, Colab, Kaggle) and as a script
# (`python examples/tour.py`). It takes the Python and the torch that are there, and needs no root.

# %% [markdown]
# ## The program
#
# A checkout of the repository is looked for around this notebook, and among Kaggle's inputs. On a machine that has none,
# fill in the repository's address.

# %%
import os
import site
import subprocess
import sys
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = ""  # an address that git can clone

here = Path(globals().get("__file__", "tour.ipynb")).absolute()
places = [*here.parents, *here.parent.glob("*/"), *Path("/kaggle/input").glob("*/")]
root = next((place for place in places if (place / "train_gpt.py").is_file()), None)
if root is None and REPOSITORY:
    root = here.parent / "ternary-gpt"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, root], check=True)
if root is None:
    raise SystemExit("no train_gpt.py around this notebook: fill in REPOSITORY above, or put the notebook into a checkout")

# what the run writes goes to data/ and logs/ of the checkout, or of this folder where the checkout cannot be written
work = root / os.environ.get("WORK_DIR", "" if os.access(root, os.W_OK) else here.parent)
work.mkdir(parents=True, exist_ok=True)
os.chdir(work)
sys.path[:0] = [str(root), str(root / "tools")]
missing = [name for name in ("torch", "numpy", "sentencepiece", "networkx", "sympy", "matplotlib") if find_spec(name) is None]
if missing:
    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing]).returncode:
        raise SystemExit(f"pip could not install {', '.join(missing)}, for the reason above; install them, and start again")
    if site.ENABLE_USER_SITE:  # where pip puts them without root; Python looks there only if the folder was there at its start
        site.addsitedir(site.getusersitepackages())
    invalidate_caches()


def tool(name, *arguments):
    """Run a program of tools/ and show what it says; stop where it fails."""
    done = subprocess.run([sys.executable, root / "tools" / name, *map(str, arguments)], capture_output=True, text=True)
    print(done.stdout + done.stderr, end="")
    done.check_returncode()


# %% [markdown]
# ## Ternary weights
#
# Importing the program starts nothing. `ternarize` is its definition of a weight: in every group, each weight becomes -1,
# 0 or +1 (`codes`) times one number that the group shares (`scales`).

# %%
import torch  # noqa: E402

import train_gpt  # noqa: E402

torch.manual_seed(42)
weights = torch.randn(4, 8)
codes, scales = train_gpt.ternarize(weights, 8)
print(weights.numpy().round(1), codes.int().numpy(), scales.numpy().round(3), sep="\n\n")

# %% [markdown]
# ## Settings
#
# Every setting is an environment variable. These are the demo's, for a minute of training; what you have set wins.

# %%
preset = root / "configs" / ("demo_gpu.env" if torch.cuda.is_available() else "demo.env")
lines = [line for line in preset.read_text().splitlines() if line and not line.startswith("#")]
settings = dict(line.split("=", 1) for line in lines) | {"MAX_WALLCLOCK_SECONDS": "60", "RUN_ID": "tour"}
settings["ARTIFACT_PATH"] = "logs/tour.ternary.ptz"
vocab = os.environ.get("VOCAB_SIZE", settings["VOCAB_SIZE"])
settings["DATA_PATH"] = data = os.environ.get("DATA_PATH", f"data/demo_sp{vocab}")
settings["TOKENIZER_PATH"] = f"{data}/tokenizer.model"
yours = os.environ.keys() - set(os.environ.get("PRESET_SETTINGS", "").split())  # without those of this cell's last run
settings = {name: value for name, value in settings.items() if name not in yours}
os.environ.update(settings, PRESET_SETTINGS=" ".join(settings))  # the program may fit what is a preset's to the text
cfg = train_gpt.Config.from_env()
params, ternary = train_gpt.count_parameters(train_gpt.GPT(cfg))
print(f"{cfg.num_layers} layers of width {cfg.model_dim}: {params:,} parameters, {ternary:,} of them ternary")

# %% [markdown]
# ## Text
#
# The demo learns from the English documentation inside three Python packages: nothing is downloaded. For a text of your
# own, make the shards with `tools/prepare_data.py text FILES --vocab-size 4096 --out data/mine`, and set DATA_PATH to
# `data/mine` before the cell above.

# %%
if data == f"data/demo_sp{cfg.vocab_size}":
    tool("prepare_data.py", "demo", "--out", data, "--vocab-size", cfg.vocab_size)

# %% [markdown]
# ## Training
#
# `main` is what `python train_gpt.py` does: it trains, writes the model to a file, builds it again from the file's bytes
# and scores that. The score is in bits per byte of text that the model has not seen.

# %%
if train_gpt.main() != 0:
    raise SystemExit("the run failed, for the reason above")

# %%
from run_logs import read_run  # noqa: E402

log = Path(cfg.log_dir) / f"{cfg.run_id}.txt"
result = read_run(log).result
print(f"{result['steps']} steps in {result['train_time_s']:.0f} s; {result['roundtrip_val_bpb']:.4f} bits per byte; "
      f"{result['artifact_bytes']:,} bytes")  # fmt: skip

# %% [markdown]
# ## It writes
#
# A minute is little: expect the sound of the text, not its sense.

# %%
tool("sample.py", cfg.artifact_path, "--tokenizer", cfg.tokenizer_path, "--sentences", 2, "--tokens", 100, "--seed", 42)

# %% [markdown]
# ## A picture of the run

# %%
picture = log.with_suffix(".png")
tool("plot_logs.py", log, "--value", "overview", "--artifact", result["artifact_path"], "--out", picture)
if "get_ipython" in globals():
    from IPython.display import Image, display

    display(Image(picture))

# %% [markdown]
# ## And now
#
# Change a setting and run it again (`os.environ["MATRIX_LR"] = "0.05"`, and another RUN_ID), compare the two
# (docs/experiments.md), or look into the model's file (docs/using.md).
