#!/usr/bin/env bash
# Everything that waits for a GPU: one command, a stage at a time. Figures go to $OUT (default: data/gpu_queue), at most 8 files.
#
#   CORPUS=FOLDER bash bench/gpu_queue.sh STAGE...
#
#   parity    losses and gradients on the GPU against the CPU; the kernels' tests on the GPU                      2 min
#   step      a training step: default, configs/pr640.env, configs/fast.env; start-up; communication at 8 GPUs    9 min
#   levers    a training step: settings one by one against the default (LEVERS: one a line)                       9 min
#   eval      chunked, stride 64 and stride 16, against the plain evaluation                                      5 min
#   kernels   bench/gemm.py: matrix products, attention, copies against their ceilings                            5 min
#   train     the default for two minutes, with its round trip and sliding score                                  5 min
#   systems   bench/arms.py, each preset at its size (SYSTEMS="pr640 fast": these), SYSTEM_SECONDS=120, what fits      9 min
#   all       all of them; about three quarters of an hour
#
# Minutes are what a stage is expected to take on one H100, not measured yet. LIMIT_S (default 585) ends a stage that takes
# longer; what fails is reported at the end and the rest goes on. BASELINE=FOLDER: another checkout, beside this one in step,
# levers and eval.
#
# FOLDER holds corpus_train_*.jsonl.xz, corpus_val.jsonl.xz and tokenizers/. Where only the working tree reaches the
# GPU's machine, put both into ignored folders that are carried along (two of the corpus files stay below 64 MiB):
#
#   mkdir -p data/carried data/baseline
#   cp CORPUS/corpus_train_0[01].jsonl.xz CORPUS/corpus_val.jsonl.xz data/carried/ && cp -r CORPUS/tokenizers data/carried/
#   git archive bc9fca9 train_gpt.py | tar x -C data/baseline
#   command: CORPUS=data/carried BASELINE=data/baseline bash bench/gpu_queue.sh step      carry: data/carried, data/baseline
#
# Uses the python that has torch (PYTHON, default python3) and sentencepiece. Nothing is downloaded.
case $- in *p*) ;; *) POSIXLY_CORRECT=1 && \exec bash -p "$0" "$@" ;; esac # without what the user's shell exports
set -uo pipefail
# shellcheck source=tools/common.sh
source "$(dirname -- "$(readlink -f -- "$0")")/../tools/common.sh"
cd "$ROOT" || exit

python=${PYTHON:-python3} out=${OUT:-data/gpu_queue} corpus=${CORPUS:-} limit_s=${LIMIT_S:-585}
against=(${BASELINE:+--against "$BASELINE"})
stages=(parity step levers eval kernels train systems)
[[ "$*" != -h && "$*" != --help ]] || { show_usage && exit; }
[[ $# -gt 0 ]] || die "a stage is missing: ${stages[*]} or all"
[[ "$*" == all ]] && set -- "${stages[@]}"
for stage; do [[ " ${stages[*]} " == *" $stage "* ]] || die "$stage: expected ${stages[*]} or all"; done
[[ -d $corpus/tokenizers ]] || die "CORPUS=$corpus: expected the folder with corpus_train_*.jsonl.xz and tokenizers/"
mkdir -p "$out"
report=()

# make_shards VOCAB: data/queue_spVOCAB, unless it is there; sets the variables of the trainer
make_shards() {
  local tokenizers=("$corpus"/tokenizers/*_"$1"_bpe.model)
  export DATA_PATH=data/queue_sp$1 TOKENIZER_PATH=${tokenizers[0]}
  [[ -e $TOKENIZER_PATH ]] || return
  [[ -e $DATA_PATH/manifest.json ]] || "$python" tools/prepare_data.py text "$corpus"/corpus_train_*.jsonl.xz \
    --val "$corpus/corpus_val.jsonl.xz" --tokenizer "$TOKENIZER_PATH" --out "$DATA_PATH"
}

# part NAME SECONDS COMMAND...: run within the time that the stage has left; output to the stage's file
part() {
  local name=$1 left=$((stage_end - SECONDS)) begin=$SECONDS code=0
  local most=$(($2 < left ? $2 : left))
  shift 2
  if ((most < 5)); then
    report+=("$stage | $name | not run: LIMIT_S=$limit_s is used up")
    return 1
  fi
  { printf '\n==== %s: %s\n\n' "$name" "$*" && timeout --kill-after=10 "$most" "$@"; } 2>&1 | tee -a "$out/$file.txt"
  code=${PIPESTATUS[0]}
  case $code in
    0) report+=("$stage | $name | ok, $((SECONDS - begin)) s") ;;
    124 | 137) report+=("$stage | $name | FAILED: ended after $most s") ;;
    *) report+=("$stage | $name | FAILED: code $code after $((SECONDS - begin)) s") ;;
  esac
  return "$code"
}

# bench NAME SECONDS ARGUMENTS...: bench/step.py, its figures as a line of figures.jsonl
bench() {
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$python" bench/step.py "$@" --json "$out/.figures"
  if [[ -e $out/.figures ]]; then
    printf '{"stage": "%s", "name": "%s", "figures": %s}\n' "$stage" "$name" "$(cat "$out/.figures")" >>"$out/figures.jsonl"
  fi
  rm -f "$out/.figures"
}

stage_parity() {
  part parity 180 "$python" bench/parity.py
  part "kernel tests" 400 "$python" -m pytest -q -p no:cacheprovider tests/test_hardware_rows.py tests/test_hardware_matrices.py
}

stage_step() {
  bench default 240 --rounds 5 "${against[@]}"
  bench pr640 200 --rounds 5 --preset configs/pr640.env "${against[@]}"
  bench fast 150 --rounds 5 --preset configs/fast.env
  bench startup 200 --startup
  bench communication 60 --world 8
}

LEVERS=${LEVERS:-"ACT_QUANT=fp8
NUM_HEADS=6 NUM_KV_HEADS=3
PARALLEL_BLOCKS=1
ATTENTION_FREE_LAYERS=1
MICRO_BATCH_TOKENS=131072"}

stage_levers() {
  local arms=() line
  while IFS= read -r line; do
    # shellcheck disable=SC2206 # a line is words
    [[ -z $line ]] || arms+=(--with $line)
  done <<<"$LEVERS"
  bench levers "$limit_s" --rounds 5 "${against[@]}" "${arms[@]}"
}

stage_eval() {
  bench evaluation "$limit_s" --eval --rounds 3 --stride 64 16 "${against[@]}"
}

stage_kernels() {
  part gemm "$limit_s" "$python" bench/gemm.py
}

# train NAME SECONDS: what the environment says; the log without the source it begins with goes to logs.txt
train() {
  local id=queue_$1
  RUN_ID=$id ARTIFACT_PATH=$out/.model.ptz part "$1" "$2" "$python" train_gpt.py
  local code=$?
  [[ ! -e logs/$id.txt ]] || { printf '\n==== %s\n' "$id" && sed -n '/^python:[0-9]/,$p' "logs/$id.txt"; } >>"$out/logs.txt"
  rm -f "$out/.model.ptz"
  return $code
}

stage_train() {
  MAX_WALLCLOCK_SECONDS=${TRAIN_SECONDS:-120} SLIDING_EVAL_STRIDE=64 train default 560
}

stage_systems() {
  local name seconds=${SYSTEM_SECONDS:-120} results=data/queue_systems
  local systems=("$python" bench/arms.py systems --data data/queue_sp --out "$results")
  make_shards 1024 || report+=("$stage | shards | not run: no tokenizer of 1024 pieces, which most systems need")
  for name in ${SYSTEMS:-$(cd configs && printf '%s\n' default ./*.env | sed 's|./||; s|[.]env||; /^demo/d')}; do
    part "$name" $((seconds + 240)) "${systems[@]}" --full --seconds "$seconds" --only "$name"
  done
  part table 60 "${systems[@]}" --table
  for name in "$results"/logs/*.txt; do
    [[ ! -e $name ]] || printf '\n==== %s\n' "$name" && sed -n '/^python:[0-9]/,$p' "$name"
  done >>"$out/logs.txt"
}

stage_end=$((SECONDS + limit_s))
make_shards 8192 || die "no shards of the vocabulary of 8192"
for stage; do
  file=${stage/levers/step} # $OUT may hold eight files
  [[ $# -eq 1 ]] || stage_end=$((SECONDS + limit_s))
  "stage_$stage"
done

printf '\n==== stage | part | outcome\n'
printf '%s\n' "${report[@]}" | tee -a "$out/$file.txt"
[[ ! " ${report[*]} " =~ FAILED|not\ run ]]
