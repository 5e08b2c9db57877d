# shellcheck shell=bash disable=SC2034 # the scripts that source it use what looks unused here
# What the scripts at the top level share; they source it. It exports nothing but the keys of a preset.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV_PYTHON=$ROOT/.venv/bin/python # made by setup.sh

# A line for the person at the terminal; stdout stays free for results.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# An error of the user's making: one line, exit code 2.
die() {
  say "error: $*"
  exit 2
}

# Whether the driver shows a GPU; needs no Python, so it can be asked before anything is installed.
has_nvidia_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == *GPU\ * ]]; }

# load_preset FILE: export its KEY=VALUE lines, except keys that the environment already has (an empty value counts).
load_preset() {
  local line key
  [[ -r $1 ]] || die "preset $1: no such file"
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^([A-Z][A-Z0-9_]*)=([^[:space:]]*)$ ]] || die "preset $1: '$line' is neither KEY=VALUE nor a comment"
    key=${BASH_REMATCH[1]}
    [[ -n ${!key+set} ]] || export "$key=${BASH_REMATCH[2]}"
  done <"$1"
}

# load_demo_preset PYTHON: the demo's preset for this machine; sets $preset to its path.
load_demo_preset() {
  preset=configs/demo.env
  if has_nvidia_gpu && "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    preset=configs/demo_gpu.env
  fi
  load_preset "$preset"
  demo_folder=data/demo_sp$VOCAB_SIZE # relative: logs hold the path, and should hold no local ones
}

# make_demo_data PYTHON: make the demo corpus for VOCAB_SIZE in $demo_folder, unless it is there and whole.
make_demo_data() {
  [[ -e $demo_folder/manifest.json ]] || say "making the demo corpus in $demo_folder (less than a minute)"
  "$1" tools/prepare_data.py demo --out "$demo_folder" --vocab-size "$VOCAB_SIZE" >/dev/null
}
