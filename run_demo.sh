#!/usr/bin/env bash
# The main job on any machine: sets up what is missing, trains a ternary GPT on a corpus that needs no download, exports
# it, scores what comes back from the bytes. Ends with a table and the `result {...}` line.
#
#   bash run_demo.sh                             about 2 minutes of training on 2 CPU cores
#   MAX_WALLCLOCK_SECONDS=20 bash run_demo.sh    every setting is a variable; it wins over configs/demo.env
#   DATA_PATH=... TOKENIZER_PATH=... bash run_demo.sh    other data
#   TRAIN_PYTHON=python3 bash run_demo.sh        an interpreter that has the requirements: nothing is installed
#
# Relative paths are relative to this folder. The exit code is the trainer's.
set -euo pipefail
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"

# keep_result FILE: pass stdin on line by line, except a last line that is the result: that goes into FILE.
keep_result() {
  local line last='' clear=''
  [[ ! -t 2 ]] || clear=$'\r\e[K' # the trainer may have drawn its progress line since it wrote this one
  while IFS= read -r line || [[ -n $line ]]; do
    [[ -z $last ]] || printf '%s\n' "$last"
    last=''
    printf '%s' "$clear" >&2
    if [[ $line == 'result {'* ]]; then last=$line; else printf '%s\n' "$line"; fi
  done
  printf '%s\n' "$last" >"$1"
}

# The trainer's data: the demo corpus, or the user's own. Token ids mean nothing to another tokenizer: both or neither.
choose_data() {
  if [[ -z ${DATA_PATH+set} && -z ${TOKENIZER_PATH+set} ]]; then
    make_demo_data "$python"
    DATA_PATH=$demo_folder
  fi
  [[ -n ${DATA_PATH+set} ]] || die "TOKENIZER_PATH=$TOKENIZER_PATH needs DATA_PATH, the folder with the shards it made"
  [[ -n ${TOKENIZER_PATH+set} || -e $DATA_PATH/tokenizer.model ]] ||
    die "DATA_PATH=$DATA_PATH needs TOKENIZER_PATH: there is no tokenizer.model in the folder"
  export DATA_PATH TOKENIZER_PATH=${TOKENIZER_PATH-$DATA_PATH/tokenizer.model}
  export RUN_ID=${RUN_ID-demo} ARTIFACT_PATH=${ARTIFACT_PATH-$demo_folder/demo.ternary.ptz}
}

main() {
  local python=${TRAIN_PYTHON:-$VENV_PYTHON} result status=0
  cd "$ROOT"
  [[ -n ${TRAIN_PYTHON:-} ]] || bash setup.sh --quiet --no-data
  load_demo_preset "$python"
  choose_data
  say "preset $preset, data $DATA_PATH, log logs/$RUN_ID.txt"

  result=$(mktemp)
  # shellcheck disable=SC2064 # the name as it is now: the variable is gone when the trap runs
  trap "rm -f '$result'" EXIT
  # threads that wait sleep: on cores shared with other work a step took 2.6 s with GNU OpenMP's spinning, .66 s without
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY-PASSIVE}
  "$python" -u train_gpt.py | keep_result "$result" || status=${PIPESTATUS[0]}
  ((status == 0)) || exit "$status"
  "$python" tools/demo_table.py "$result" --manifest "$DATA_PATH/manifest.json"
  cat "$result"
}

main "$@"
