#!/usr/bin/env bash
# Makes .venv, installs the pinned requirements, prepares the data, and shows what is there.
#
#   bash setup.sh                      environment and demo corpus (for the VOCAB_SIZE of the demo's preset)
#   bash setup.sh --no-data            the environment only; the same as --data none
#   bash setup.sh --data fineweb       environment and the published FineWeb shards: the full run's 52, or --shards N
#   bash setup.sh --tests              with requirements-test.txt and requirements-data.txt
#   bash setup.sh --python python3.12  build .venv with this interpreter (3.10 to 3.13)
#   bash setup.sh --quiet              only what changes and errors; no table
#   WORK_DIR=FOLDER bash setup.sh      .venv and data there: for a checkout that cannot be written
#
# Run it again at any time: what is there is kept (seconds, no network), what is missing or damaged is repaired.
# TORCH_INDEX names the place of PyTorch's own wheels, for instance a mirror of the default.
case $- in *p*) ;; *) POSIXLY_CORRECT=1 && \exec bash -p "$0" "$@" ;; esac # without what the user's shell exports
set -euo pipefail
# shellcheck source=tools/common.sh
source "$(dirname -- "$(readlink -f -- "$0")")/tools/common.sh"

TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl}
brief=(--retries 2 --timeout 15) # an index that cannot be reached costs seconds, not minutes
python_wanted='' data=demo shards='' quiet='' requirements=(requirements.txt)

parse_options() {
  while (($#)); do
    case $1 in
      --python | --data | --shards)
        (($# > 1)) || die "$1: a value is missing; see bash setup.sh --help"
        case $1 in
          --python) python_wanted=$2 ;;
          --data) data=$2 ;;
          --shards) shards=$2 ;;
        esac
        shift
        ;;
      --no-data) data=none ;;
      --tests) requirements+=(requirements-test.txt requirements-data.txt) ;;
      --quiet) quiet=1 ;;
      -h | --help) show_usage && exit ;;
      *) die "$1: not an option; see bash setup.sh --help" ;;
    esac
    shift
  done
  if [[ ${requirements[*]} == *test* && $(uname -s) == Linux ]] && ! has_nvidia_gpu; then
    requirements+=(requirements-test-cpu.txt)
  fi
  case $data in
    demo | none) ;;
    fineweb) requirements+=(requirements-data.txt) ;;
    *) die "--data $data: expected demo, fineweb or none" ;;
  esac
  [[ -z $shards || $data == fineweb ]] || die "--shards $shards: needs --data fineweb"
}

# Two setups of one folder would install over each other: the second one waits. flock's 1 is "held by another"; any other code is
# of a file system that has no locks (Lustre, NFS), where waiting would not end.
wait_for_other_setup() {
  local code=0
  command -v flock >/dev/null || return 0
  exec 9<"${work:-$ROOT}"
  flock --nonblock 9 2>/dev/null || code=$?
  if ((code == 1)); then
    say "waiting for another setup.sh of this folder" && flock 9
  elif ((code > 1)); then
    say "this file system has no locks: do not start a second setup.sh of this folder meanwhile"
  fi
}

# ---- Python

# python_version PYTHON: print "3.11"; or fail and print why it cannot make the environment (nothing: it does not run).
python_version() {
  "$1" - 2>/dev/null <<'PROBE'
import sys
answer, usable = "%d.%d" % sys.version_info[:2], (3, 10) <= sys.version_info[:2] <= (3, 13)
try:
    import ensurepip, venv
except ImportError:
    answer, usable = "%s without venv (Debian, Ubuntu: apt-get install python%s-venv)" % (answer, answer), False
print(answer)
sys.exit(not usable)
PROBE
}

# Print the first usable interpreter; without one, end with one line that says what is wrong with each that was found.
find_python() {
  local candidates=(python3 python3.13 python3.12 python3.11 python3.10) candidate version found=''
  [[ -z $python_wanted ]] || candidates=("$python_wanted")
  for candidate in "${candidates[@]}"; do
    if version=$(python_version "$candidate"); then
      printf '%s\n' "$candidate"
      return
    fi
    [[ -z $version ]] || found+="${found:+; }$candidate is $version"
  done
  die "no usable Python 3.10 to 3.13 (${found:-${candidates[0]} does not run}); install one, or name it with --python; with packages of its own: TRAIN_PYTHON=PYTHON bash run_demo.sh"
}

# Whether .venv works and, where --python is given, is of that version.
venv_works() {
  local version
  version=$(python_version "$VENV_PYTHON") && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || return
  [[ -z $python_wanted || $version == "$(python_version "$python_wanted")" ]]
}

make_venv() {
  local python
  if venv_works; then return; fi
  python=$(find_python)
  say "making ${work}.venv with $python ($(python_version "$python"))"
  "$python" -m venv --clear "$VENV" >&2 || die "$python -m venv $VENV failed; its message is above"
}

# ---- Packages

pip() { "$VENV_PYTHON" -m pip --disable-pip-version-check "$@" >&2; }

# Files that were lost (a full disk, a careless rm) are invisible to pip: it sees the package's record and is content.
remove_damaged() {
  local damaged
  damaged=$("$VENV_PYTHON" tools/check_setup.py damaged)
  [[ -n $damaged ]] || return 0
  say "damaged, installing again: ${damaged//$'\n'/ }"
  # shellcheck disable=SC2086 # one word a package
  pip uninstall --quiet --yes $damaged || die "pip cannot remove a damaged package; rm -r $VENV and run setup.sh again"
}

# install_torch_cpu PIN: pip's default index has the CUDA build for Linux, gigabytes with its libraries. Without a GPU the
# CPU build is asked for by its full version: where this pip looks anyway (a mirror, local wheels), then in PyTorch's own
# index. Fails if neither has it.
install_torch_cpu() {
  pip install --quiet --no-user --no-deps "$1+cpu" 2>/dev/null ||
    pip install --quiet --no-user --no-deps "${brief[@]}" --index-url "$TORCH_INDEX/cpu" "$1+cpu" 2>/dev/null
}

# leave_triton_out: of the tests' requirements, where the torch that is installed brings a Triton of its own, as CUDA builds do.
leave_triton_out() {
  [[ ${requirements[*]} == *test-cpu* ]] || return 0
  local brings='import importlib.metadata as m; raise SystemExit(not any(r.startswith("triton") for r in m.requires("torch") or ()))'
  if "$VENV_PYTHON" -c "$brings" 2>/dev/null; then
    read -ra requirements <<<"${requirements[*]/requirements-test-cpu.txt/}"
  fi
}

install_requirements() {
  local missing torch
  leave_triton_out
  missing=$("$VENV_PYTHON" tools/check_setup.py missing "${requirements[@]}")
  [[ -z $missing ]] || say "installing ${missing//$'\n'/ } (minutes the first time)"
  torch=$(grep '^torch==' <<<"$missing" || true)
  if [[ -n $torch && $(uname -s) == Linux ]] && ! has_nvidia_gpu && ! install_torch_cpu "$torch"; then
    say "no CPU build of $torch within reach: taking pip's default build (larger; it runs on a CPU too)"
    pip install --quiet --no-user "$torch" || die "pip failed on $torch; its message is above"
    leave_triton_out
  fi
  pip install --quiet --no-user "${requirements[@]/#/--requirement=}" ||
    die "pip failed on ${requirements[*]}; its message is above"
  [[ -n $missing ]] || return 0
  missing=$("$VENV_PYTHON" tools/check_setup.py missing "${requirements[@]}")
  [[ -z $missing ]] ||
    die "pip put ${missing//$'\n'/ } elsewhere than in $VENV; see target, prefix and root in: pip config list"
}

# FlashAttention-3 is worth having on Hopper only, and PyTorch's attention serves where it cannot be had. Tried once.
install_flash_attention() {
  local tried=$VENV/flash-attention-tried cuda
  [[ ! -e $tried && $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) == 9.0* ]] || return 0
  say "a Hopper GPU: trying FlashAttention-3"
  cuda=$("$VENV_PYTHON" -c 'import torch; print("cu" + (torch.version.cuda or "").replace(".", ""))')
  if ! { pip install --quiet --no-user --no-deps --only-binary=:all: "${brief[@]}" \
    --index-url "$TORCH_INDEX/$cuda" flash-attn-3 2>/dev/null &&
    "$VENV_PYTHON" -c 'import flash_attn_interface' 2>/dev/null; }; then
    pip uninstall --quiet --yes flash-attn-3 2>/dev/null || true
    say "no FlashAttention-3 for this torch and CUDA: PyTorch's own attention serves"
  fi
  touch "$tried"
}

# ---- Data

prepare_data() {
  case $data in
    demo)
      load_demo_preset "$VENV_PYTHON"
      make_demo_data "$VENV_PYTHON"
      data_folder=$demo_folder
      ;;
    fineweb)
      "$VENV_PYTHON" tools/prepare_data.py fetch sp8192 --out "${work}data" ${shards:+--shards "$shards"}
      data_folder=${work}data/datasets/fineweb10B_sp8192
      ;;
    none) data_folder='' ;;
  esac
}

main() {
  trap 'exit 130' INT # pip turns Ctrl-C into a plain failure, which must not look like a missing wheel
  cd "$ROOT"
  parse_options "$@"
  if ! venv_works; then
    find_python >/dev/null # or the end, before a folder is made
    make_folder "${work:-$ROOT}"
  fi
  wait_for_other_setup
  make_venv
  remove_damaged
  install_requirements
  install_flash_attention
  prepare_data
  [[ -n $quiet ]] || "$VENV_PYTHON" tools/check_setup.py table "${requirements[@]}" ${data_folder:+--data "$data_folder"}
}

main "$@"
