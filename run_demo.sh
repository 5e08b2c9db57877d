#!/usr/bin/env bash
# The main job on any machine: sets up what is missing, trains a ternary GPT on a corpus that needs no download, exports
# it, scores what comes back from the bytes. Ends with a table, two sentences that the model writes, and the `result {...}`
# line.
#
#   bash run_demo.sh                             about 2 minutes of training on 2 CPU cores
#   bash run_demo.sh --text FILE...              your own text: files or folders of .txt, .jsonl, .parquet
#   MAX_WALLCLOCK_SECONDS=20 bash run_demo.sh    every setting is a variable; it wins over configs/demo.env
#   DATA_PATH=... TOKENIZER_PATH=... bash run_demo.sh    shards that are there
#   EVAL_ONLY=1 bash run_demo.sh                 score the artifact of the last such run again
#   TRAIN_PYTHON=python3 bash run_demo.sh        an interpreter that has the requirements: nothing is installed
#   WORK_DIR=FOLDER bash run_demo.sh             .venv, data, logs and artifacts there: for a checkout that cannot be written
#
# With matplotlib (bash setup.sh --tests) it draws the run, beside its log. The artifact lies beside the shards (where they cannot be written: beside the log) and is named at the end. Paths in
# variables are relative to this folder, those after --text to where you are. The exit code is the trainer's.
case $- in *p*) ;; *) POSIXLY_CORRECT=1 && \exec bash -p "$0" "$@" ;; esac # without what the user's shell exports
set -euo pipefail
# shellcheck source=tools/common.sh
source "$(dirname -- "$(readlink -f -- "$0")")/tools/common.sh"

text=() # files and folders, absolute

parse_options() {
  local file
  case ${1:-} in
    -h | --help) show_usage && exit ;;
    --text) (($# > 1)) || die "--text: a file or folder is missing; see bash run_demo.sh --help" ;;
    *) (($# == 0)) || die "$1: not an option; see bash run_demo.sh --help" ;;
  esac
  for file in "${@:2}"; do
    [[ -e $file ]] || die "--text $file: no such file or folder"
    [[ $file == /* ]] || file=$PWD/$file
    text+=("$file")
  done
  [[ -z ${text[*]-} || -z ${DATA_PATH+set}${TOKENIZER_PATH+set} ]] ||
    die "--text makes shards and a tokenizer: expected no DATA_PATH and TOKENIZER_PATH beside it"
}

# keep_result FILE: pass stdin on line by line, except a last line that is the result: that goes into FILE.
keep_result() {
  local line last='' clear=''
  [[ ! -t 1 ]] || clear=$'\r\e[J' # the trainer may have drawn its bar since it wrote this line
  while IFS= read -r line || [[ -n $line ]]; do
    [[ -z $last ]] || printf '%s\n' "$last"
    last=''
    if [[ $line == 'result {'* ]]; then last=$line; else printf '%s%s\n' "$clear" "$line"; fi
  done
  printf '%s\n' "$last" >"$1"
}

# Shards of the user's text, in a folder that is named by what the files hold: made once, and anew when they change.
make_text_data() {
  local plan name pieces val_fraction
  plan=$("$python" tools/own_text.py --most-pieces "$VOCAB_SIZE" "${text[@]}")
  read -r name pieces val_fraction <<<"$plan"
  # what the user says about the vocabulary holds; what the preset says is the demo's
  [[ " $PRESET_SETTINGS " != *" VOCAB_SIZE "* ]] || VOCAB_SIZE=$pieces
  DATA_PATH=${work}data/${name}_sp$VOCAB_SIZE
  if [[ -e $DATA_PATH/manifest.json ]]; then return; fi
  say "making shards and a tokenizer of $VOCAB_SIZE pieces in $DATA_PATH"
  if ! "$python" tools/prepare_data.py text "${text[@]}" --vocab-size "$VOCAB_SIZE" --val-fraction "$val_fraction" \
    --out "$DATA_PATH" >&2; then
    if [[ -e $DATA_PATH/manifest.json ]]; then return; fi # another run_demo.sh of this text was faster
    rmdir "$DATA_PATH" "${DATA_PATH%/*}" 2>/dev/null || true
    die "--text: no shards of it, for the reason above; VOCAB_SIZE=... asks for another number of pieces, docs/data.md has the rest"
  fi
}

# The trainer's data: the demo corpus, or the user's own. Token ids mean nothing to another tokenizer: both or neither.
choose_data() {
  if [[ -n ${text[*]-} ]]; then
    make_text_data
  elif [[ -z ${DATA_PATH+set} && -z ${TOKENIZER_PATH+set} ]]; then
    make_demo_data "$python"
    DATA_PATH=$demo_folder
  fi
  [[ -n ${DATA_PATH+set} ]] || die "TOKENIZER_PATH=$TOKENIZER_PATH needs DATA_PATH, the folder with the shards it made"
  [[ -n ${TOKENIZER_PATH+set} || -e $DATA_PATH/tokenizer.model ]] ||
    die "DATA_PATH=$DATA_PATH needs TOKENIZER_PATH: there is no tokenizer.model in the folder"
  export DATA_PATH TOKENIZER_PATH=${TOKENIZER_PATH-$DATA_PATH/tokenizer.model}
  choose_names
}

# Log and artifact are named by the data, so that runs on other data do not take each other's place.
choose_names() {
  local name folder=$DATA_PATH
  name=$(basename -- "$DATA_PATH")
  [[ $DATA_PATH != "$demo_folder" ]] || name=demo
  [[ $name =~ ^[A-Za-z0-9_][A-Za-z0-9._-]{0,79}$ ]] || name=own # what RUN_ID may be
  [[ -w $folder ]] || folder=${LOG_DIR:-logs}
  export RUN_ID=${RUN_ID-$name}
  export ARTIFACT_PATH=${ARTIFACT_PATH-$folder/$RUN_ID.ternary.ptz}
}

# Two sentences that begin a document, always the same ones of a model. What goes wrong here is said, and ends no demo.
write_sentences() {
  [[ -s $ARTIFACT_PATH ]] || return 0
  say "two sentences of the model:" # before seconds of silence, as it is loaded
  "$python" tools/sample.py "$ARTIFACT_PATH" --tokenizer "$TOKENIZER_PATH" --sentences 2 --tokens 100 --seed 42 || true
  echo
}

# draw_picture RESULT: the run of a result line as a picture beside its log, where there is matplotlib; a picture that fails
# fails alone. What only scored an artifact has no curves.
draw_picture() {
  local log artifact
  [[ ! ${EVAL_ONLY:-0} =~ ^(1|[Tt][Rr][Uu][Ee])$ ]] || return 0
  { read -r log && read -r artifact; } < <("$python" -c 'import json, sys
result = json.loads(sys.stdin.read().partition(" ")[2])
print(result.get("log_path", ""), result.get("artifact_path", ""), sep="\n")' <"$1") || return 0
  [[ -s $artifact ]] || artifact='' # lost, and said to be
  [[ -n $log ]] && "$python" -c 'import matplotlib' 2>/dev/null || return 0
  say "drawing the run"
  "$python" tools/plot_logs.py "$log" --value overview ${artifact:+--artifact "$artifact"} --out "${log%.txt}.png" || return 0
  say "picture ${log%.txt}.png"
}

main() {
  local python result status=0
  parse_options "$@"
  cd "$ROOT"
  [[ ! -t 2 || -n ${TRAIN_PYTHON:-} ]] || say "checking ${work}.venv" # seconds, where all is there
  choose_python
  load_demo_preset "$python"
  choose_data
  make_folder "${LOG_DIR:-logs}"
  say "preset $preset, data $DATA_PATH, log ${LOG_DIR:-logs}/$RUN_ID.txt"

  result=$(mktemp)
  # shellcheck disable=SC2064 # the name as it is now: the variable is gone when the trap runs
  trap "rm -f $(printf %q "$result")" EXIT
  # threads that wait sleep: on cores shared with other work a step took 2.6 s with GNU OpenMP's spinning, .66 s without
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY-PASSIVE}
  "$python" -u train_gpt.py | keep_result "$result" || status=${PIPESTATUS[0]}
  ((status == 0)) || exit "$status"
  "$python" tools/demo_table.py "$result" --manifest "$DATA_PATH/manifest.json" --artifact "$ARTIFACT_PATH"
  write_sentences
  draw_picture "$result"
  cat "$result"
}

main "$@"
