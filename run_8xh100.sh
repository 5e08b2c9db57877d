#!/usr/bin/env bash
# The record run: train_gpt.py is packed, the packed file runs with seeds 42, 1337 and 7 and the default settings on 8 GPUs,
# the rules are checked on the logs, and submission.json is made of them. Before the first run everything that the end will
# need is checked.
#
#   bash run_8xh100.sh                                three runs of 10 minutes, each with its log and artifact in logs/ (LOG_DIR)
#   SEED=42 bash run_8xh100.sh                        one seed; SEED="42 7": these
#   bash run_8xh100.sh --author NAME --github-id ID   arguments go to tools/make_submission.py, for instance
#   bash run_8xh100.sh --records records --name NAME --record THEIR/submission.json   also the folder that is submitted
#
# NPROC: processes, one a GPU (8). RUN_ID: the prefix of <RUN_ID>_seed<SEED> (record). SUBMISSION_PATH: submission.json.
# TRAIN_PYTHON: an interpreter that has the requirements, instead of .venv's.
# ALLOW_CPU=1: a rehearsal on CPU processes; it never writes the real submission.json unless told to. For instance, on the
# demo's data and model (bash setup.sh makes the data), in this folder:
#
#   (set -a; . configs/demo.env; DATA_PATH=data/demo_sp4096; TOKENIZER_PATH=$DATA_PATH/tokenizer.model
#    ITERATIONS=3; NPROC=2; ALLOW_CPU=1; bash run_8xh100.sh --author NAME --github-id ID)
case $- in *p*) ;; *) POSIXLY_CORRECT=1 && \exec bash -p "$0" "$@" ;; esac # without what the user's shell exports
set -euo pipefail
# shellcheck source=tools/common.sh
source "$(dirname -- "$(readlink -f -- "$0")")/tools/common.sh"

# torchrun's shared store makes restarted attempts fail (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# check_machine PYTHON: end with one line if GPUs or data are missing; say which settings are not the submission's.
check_machine() {
  "$1" - "$nproc" "${ALLOW_CPU:-0}" <<'CHECK' || exit 2
import dataclasses
import sys
from pathlib import Path

try:
    import torch
    import train_gpt
except ImportError as error:
    sys.exit(f"run_8xh100.sh: error: {sys.executable}: {error}; bash setup.sh installs the requirements")

nproc, allow_cpu = int(sys.argv[1]), sys.argv[2] == "1"
own = ("run_id", "seed", "artifact_path", "log_dir")  # this script sets them, or they are where things lie


def stop(text):
    sys.exit(f"run_8xh100.sh: error: {text}")


try:
    cfg = train_gpt.Config.from_env()
except train_gpt.UserError as error:
    stop(error)
if cfg.eval_only:
    stop("EVAL_ONLY=1: expected 0, these runs train")
if not allow_cpu and torch.cuda.device_count() < nproc:
    stop(f"NPROC={nproc}, but torch sees {torch.cuda.device_count()} GPUs; set NPROC, or ALLOW_CPU=1 for a rehearsal")
for split in ("train", "val"):
    if not any(Path(cfg.data_path).glob(f"fineweb_{split}_*.bin")):
        stop(f"DATA_PATH={cfg.data_path}: no fineweb_{split}_*.bin there")
if not Path(cfg.tokenizer_path).is_file():
    stop(f"TOKENIZER_PATH={cfg.tokenizer_path}: no such file")
changed = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in own and v != getattr(train_gpt.Config(), k)}
if changed:
    print("run_8xh100.sh: not the submission's settings:", *(f"{k.upper()}={v}" for k, v in changed.items()), file=sys.stderr)
CHECK
}

# choose_seeds: SEED's numbers, or the record's three, into $seeds; the one with the longest name into $largest.
choose_seeds() {
  local seed seen=''
  read -r -d '' -a seeds <<<"${SEED:-42 1337 7}" || : # the end of the text is no newline
  ((${#seeds[@]})) || die "SEED='$SEED': expected whole numbers"
  for seed in "${seeds[@]}"; do
    [[ $seed =~ ^(0|[1-9][0-9]{0,17})$ ]] || die "SEED='$SEED': expected whole numbers, found '$seed'"
    [[ "$seen " != *" $seed "* ]] || die "SEED='$SEED': expected each seed once"
    seen+=" $seed"
    ((seed <= largest)) || largest=$seed
  done
}

# run_seed SEED: one run; ends the script with the run's exit code if it fails, and with the trainer's line as the last one.
# stderr goes through a pipe, so that the line that torchrun's own report would bury is known at the end.
run_seed() {
  local run_id=${prefix}_seed$1 status=0 said
  say "seed $1: log $folder/$run_id.txt"
  # python -m torch.distributed.run is torchrun; the latter's first line breaks when .venv is moved
  {
    RUN_ID=$run_id SEED=$1 ARTIFACT_PATH=$folder/$run_id.ternary.ptz \
      "$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" "$packed" 2>&1 >&3 3>&- |
      tee "$complaints" >&2 || status=${PIPESTATUS[0]}
  } 3>&1
  ((status == 0)) && logs+=("$folder/$run_id.txt") && return
  said=$(sed -n -E "/^train_gpt\.py: warning: /d; s#^(train_gpt\.py|.*/${packed##*/}): (.*)#\2#p" "$complaints" | tail -n 1)
  [[ -z $said ]] || { say "error: seed $1: $said" && exit $((status > 128 ? status : 2)); } # above 128: it was stopped
  say "error: seed $1 failed with exit code $status; log: $folder/$run_id.txt"
  exit "$status"
}

main() {
  local python=${TRAIN_PYTHON:-$VENV_PYTHON} nproc=${NPROC:-8} folder=${LOG_DIR:-logs} prefix submission packed source complaints
  local seed largest=0 seeds=() check=() logs=()
  cd "$ROOT"
  if [[ " $* " == *" -h "* || " $* " == *" --help "* ]]; then
    sed -n '2,/^set -/s/^# \{0,1\}//p' run_8xh100.sh
    exit
  fi
  [[ ${ALLOW_CPU:-0} == [01] ]] || die "ALLOW_CPU=$ALLOW_CPU: expected 0 or 1"
  if [[ ${ALLOW_CPU:-0} == 1 ]]; then
    prefix=${RUN_ID:-rehearsal} submission=${SUBMISSION_PATH:-$folder/$prefix.submission.json}
  else
    prefix=${RUN_ID:-record} submission=${SUBMISSION_PATH:-submission.json}
  fi
  packed=$folder/${prefix}_train_gpt.py source=$folder/${prefix}_readable.py

  choose_seeds
  [[ $nproc =~ ^[1-9][0-9]{0,3}$ ]] || die "NPROC=$nproc: expected a whole number, 1 to 9999"
  [[ " $* " != *" --check"[\ =]* ]] || die "--check: this script does it by itself"
  command -v "$python" >/dev/null || die "$python: not there; bash setup.sh makes it"
  RUN_ID=${prefix}_seed$largest SEED=$largest check_machine "$python"
  check=("$python" tools/make_submission.py --out "$submission" --check "${#seeds[@]}" "$@")
  "${check[@]}"

  # what runs is what ships: the log begins with it, and its size counts; the readable file may be changed while it runs
  "$python" tools/pack_code.py train_gpt.py --out "$packed" >&2 || exit 2
  cp train_gpt.py "$source"
  "${check[@]}" --code "$packed" --source "$source"
  if ! command -v git >/dev/null; then
    say "git: not there; the logs will not know the commit"
  elif ! git diff --quiet HEAD -- train_gpt.py 2>/dev/null; then
    say "train_gpt.py is not as committed; the logs hold what ran"
  fi

  complaints=$(mktemp)
  # shellcheck disable=SC2064 # the name as it is now: the variable is gone when the trap runs
  trap "rm -f '$complaints'" EXIT
  for seed in "${seeds[@]}"; do run_seed "$seed"; done
  # with --records, make_submission.py checks the rules itself, and writes nothing if one is broken
  [[ " $* " == *" --records"[\ =]* ]] || "$python" tools/compliance.py --code "$packed" "${logs[@]}" ||
    say "not a record yet: the breaches are above"
  "$python" tools/make_submission.py --out "$submission" --code "$packed" --source "$source" "$@" "${logs[@]}"
}

main "$@"; exit # here bash has read all it will: the file may be changed, by git pull for instance, while it runs
