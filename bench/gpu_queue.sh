#!/usr/bin/env bash
# Everything that waits for a GPU: one command, a stage at a time. Figures go to $OUT (default: data/gpu_queue), at most 8 files.
#
#   DATA_PATH=SHARDS bash bench/gpu_queue.sh first       what matters most, within 9 minutes; its parts are listed below
#   DATA_PATH=SHARDS bash bench/gpu_queue.sh recipe      the default against configs/pr640.env, TRAIN_SECONDS=120 each, within 9 minutes
#   CORPUS=FOLDER bash bench/gpu_queue.sh STAGE...
#
#   parity    losses and gradients on the GPU against the CPU; the kernels' tests on the GPU                      2 min
#   step      a training step: default, configs/pr640.env, configs/fast.env; start-up; communication at 8 GPUs    9 min
#   levers    a training step: settings one by one against the default (LEVERS: one a line)                       9 min
#   eval      chunked, stride 64 and stride 16, against the plain evaluation                                      5 min
#   kernels   bench/gemm.py: matrix products, attention, copies against their ceilings                            5 min
#   train     the default for two minutes, with its round trip and sliding score                                  5 min
#   systems   bench/arms.py, each preset at its size (SYSTEMS="pr640 fast": these), SYSTEM_SECONDS=120, what fits      9 min
#   all       these seven; about three quarters of an hour
#
# Minutes are what a stage is expected to take on one H100, not measured yet. LIMIT_S (default 585; first: 540) ends a stage
# that takes longer; what fails is reported at the end and the rest goes on. BASELINE=FOLDER: another checkout, beside this
# one in step, levers and eval.
#
# recipe trains both with the same SEED (42) on the same tokens, scores the first 1,048,576 targets, chunked and in windows 256
# apart, and ends with one line: the difference. Half of the time is each one's.
#
# first, on one H100; seconds are budgeted, not measured yet. A part is ended at its most; with another LIMIT_S all of them
# change in proportion. What a part has printed is in $OUT/first.txt as soon as it ends; the tables come last.
#
#   part          expected  most   what
#   check               80   120   train_gpt.py, 3 steps: the self-check of every kernel with its errors, a cold start-up
#   step default        25    35   ms of a training step, time by kernel group
#   step pr640          40    55   the same of configs/pr640.env
#   train default       85   100   trained for 60 s (TRAIN_SECONDS), round trip, sliding score of 1,048,576 targets
#   train pr640         95   110   the same
#   off default         30    40   ms of a step with KERNELS=off
#   off pr640           30    40   the same
#   eval                25    30   stride 16 on 1,024 windows against the plain evaluation
#   table                1    10   bench/gpu_table.py: all of it, and R009's column, for RESULTS.md
#   sum                411   540
#
# SHARDS holds fineweb_*.bin and tokenizer.model, FOLDER corpus_train_*.jsonl.xz, corpus_val.jsonl.xz and tokenizers/. Where
# only the working tree reaches the GPU's machine, put them into an ignored folder that is carried along: one corpus file
# as shards, or two of them compressed, stay below 64 MiB.
#
#   python tools/prepare_data.py text CORPUS/corpus_train_00.jsonl.xz --val CORPUS/corpus_val.jsonl.xz \
#     --tokenizer CORPUS/tokenizers/fineweb_8192_bpe.model --out data/shards
#   command: DATA_PATH=data/shards bash bench/gpu_queue.sh first                                carry: data/shards
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

python=${PYTHON:-python3} out=${OUT:-data/gpu_queue} corpus=${CORPUS:-}
against=(${BASELINE:+--against "$BASELINE"})
stages=(parity step levers eval kernels train systems)
[[ "$*" != -h && "$*" != --help ]] || { show_usage && exit; }
[[ $# -gt 0 ]] || die "a stage is missing: first, recipe, ${stages[*]} or all"
[[ "$*" == all ]] && set -- "${stages[@]}"
alone=$([[ "$*" == first || "$*" == recipe ]] && echo "$*") # a stage that is the whole call
for stage; do
  [[ " ${stages[*]} " == *" $stage "* || $alone ]] || die "$stage: expected first or recipe alone, ${stages[*]} or all"
done
limit_s=${LIMIT_S:-$([[ $alone ]] && echo 540 || echo 585)}
[[ $limit_s =~ ^[1-9][0-9]{0,5}$ ]] || die "LIMIT_S=$limit_s: expected seconds"
if [[ $alone && -n ${DATA_PATH:-} ]]; then
  compgen -G "$DATA_PATH/fineweb_train_*.bin" >/dev/null || die "DATA_PATH=$DATA_PATH: expected a folder with fineweb_train_*.bin in it"
  export DATA_PATH TOKENIZER_PATH=${TOKENIZER_PATH:-$DATA_PATH/tokenizer.model}
  [[ -f $TOKENIZER_PATH ]] || die "TOKENIZER_PATH=$TOKENIZER_PATH: no such file"
else
  [[ -d $corpus/tokenizers ]] || die "CORPUS=$corpus: expected the folder with corpus_train_*.jsonl.xz and tokenizers/"
fi
mkdir -p "$out"
report=() settings=() # of the parts with bench/step.py
figures=$out/${alone:-figures}.jsonl
[[ -z $alone ]] || rm -f "$figures" "$out/$alone.txt" # the table is made from what this call has measured

# make_shards VOCAB: data/queue_spVOCAB, unless it is there; sets the variables of the trainer
make_shards() {
  local tokenizers=("$corpus"/tokenizers/*_"$1"_bpe.model)
  export DATA_PATH=data/queue_sp$1 TOKENIZER_PATH=${tokenizers[0]}
  [[ -e $TOKENIZER_PATH ]] || return
  [[ -e $DATA_PATH/manifest.json ]] || "$python" tools/prepare_data.py text "$corpus"/corpus_train_*.jsonl.xz \
    --val "$corpus/corpus_val.jsonl.xz" --tokenizer "$TOKENIZER_PATH" --out "$DATA_PATH"
}

# record NAME OUTCOME [KEY JSON]: a line of the report at the end, and one of the figures
record() {
  report+=("$stage | $1 | $2")
  printf '{"stage": "%s", "name": "%s", "outcome": "%s"%s}\n' "$stage" "$1" "$2" "${3:+, \"$3\": $4}" >>"$figures"
}

# part NAME SECONDS COMMAND...: run within the time that the stage has left, output to the stage's file; sets $outcome. Not
# through a pipe: processes that a compiler has started may outlive it, and a pipe ends with the last that writes to it.
part() {
  local name=$1 left=$((stage_end - SECONDS)) begin=$SECONDS code=0 written
  local most=$(($2 < left - 5 ? $2 : left - 5)) # five seconds for what has to be killed
  shift 2
  if ((most < 1)); then
    outcome="not run: LIMIT_S=$limit_s is used up"
    return 1
  fi
  written=$(stat -c %s "$out/$file.txt" 2>/dev/null || echo 0)
  printf '\n==== %s: %s\n\n' "$name" "$*" >>"$out/$file.txt"
  timeout --kill-after=5 "$most" "$@" >>"$out/$file.txt" 2>&1 </dev/null || code=$?
  tail -c +$((written + 1)) "$out/$file.txt"
  case $code in
    0) outcome="ok, $((SECONDS - begin)) s" ;;
    124 | 137) outcome="FAILED: ended after $most s" ;;
    *) outcome="FAILED: code $code after $((SECONDS - begin)) s" ;;
  esac
  return "$code"
}

# run NAME SECONDS COMMAND...: a part without figures
run() {
  part "$@"
  record "$1" "$outcome"
}

# bench NAME SECONDS ARGUMENTS...: bench/step.py, with its figures
bench() {
  rm -f "$out/.figures"
  part "$1" "$2" env ${settings[@]+"${settings[@]}"} "$python" bench/step.py "${@:3}" --json "$out/.figures"
  record "$1" "$outcome" "$([[ -s $out/.figures ]] && echo figures)" "$(cat "$out/.figures" 2>/dev/null)"
  rm -f "$out/.figures"
}

stage_parity() {
  run parity 180 "$python" bench/parity.py
  run "kernel tests" 400 "$python" -m pytest -q -p no:cacheprovider tests/test_hardware_rows.py tests/test_hardware_matrices.py
}

stage_step() {
  bench default 240 --rounds 5 "${against[@]}"
  bench pr640 200 --rounds 5 --preset configs/pr640.env "${against[@]}"
  bench fast 150 --rounds 5 --preset configs/fast.env
  bench startup 200 --startup
  bench communication 60 --world 8
}

# the first three leave out a kernel; bench/gpu_table.py fills R009's column from all but the last
LEVERS=${LEVERS:-"KERNELS=matmul,norm,qk,attention,mlp,score
KERNELS=matmul,norm,qk,attention,loss,score
KERNELS=matmul,norm,attention,mlp,loss,score
ACT_QUANT=fp8
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
  run table 10 "$python" bench/gpu_table.py "$figures"
}

stage_eval() {
  bench evaluation "$limit_s" --eval --rounds 3 --stride 64 16 "${against[@]}"
}

stage_kernels() {
  run gemm "$limit_s" "$python" bench/gemm.py
}

# train NAME SECONDS: what the environment says; the log without the source it begins with goes to logs.txt
train() {
  local id=queue_${1// /_} result=''
  rm -f "logs/$id.txt"
  RUN_ID=$id ARTIFACT_PATH=$out/.model.ptz part "$1" "$2" "$python" train_gpt.py
  if [[ -e logs/$id.txt ]]; then
    result=$(sed -n '$s/^result //p' "logs/$id.txt")
    { printf '\n==== %s\n' "$id" && sed -n '/^python:[0-9]/,$p' "logs/$id.txt"; } >>"$out/logs.txt"
  fi
  record "$1" "$outcome" "${result:+result}" "$result"
  rm -f "$out/.model.ptz"
}

stage_train() {
  MAX_WALLCLOCK_SECONDS=${TRAIN_SECONDS:-120} SLIDING_EVAL_STRIDE=64 train default 560
}

# most NUMBER: the seconds that a part of `first` may take, in proportion to LIMIT_S
most() { echo $(($1 * limit_s / 540)); }

# with_preset FILE COMMAND...: the command with the preset's settings, which are gone afterwards
with_preset() {
  local name
  load_preset "$1"
  "${@:2}"
  for name in $PRESET_SETTINGS PRESET_SETTINGS; do unset "$name"; done
}

stage_first() {
  local short=(--rounds 3 --warmup 3 --profile-steps) preset=configs/pr640.env
  export SLIDING_EVAL_STRIDE=64 VAL_MAX_TOKENS=1048576
  stage_end=$((stage_end - 10)) # for the table
  MAX_WALLCLOCK_SECONDS=0 ITERATIONS=3 train check "$(most 120)"
  # a run goes on without what has failed the self-check, bench/step.py would not
  read -ra settings < <("$python" bench/gpu_table.py --usable "$figures")
  bench "step default" "$(most 35)" "${short[@]}" 1
  bench "step pr640" "$(most 55)" "${short[@]}" 1 --preset $preset
  export MAX_WALLCLOCK_SECONDS=${TRAIN_SECONDS:-60}
  train "train default" "$(most 100)"
  with_preset $preset train "train pr640" "$(most 110)"
  settings+=(KERNELS=off)
  bench "off default" "$(most 40)" "${short[@]}" 0
  bench "off pr640" "$(most 40)" "${short[@]}" 0 --preset $preset
  unset 'settings[-1]'
  bench eval "$(most 30)" --eval --rounds 1 --stride 16 --eval-windows 1024 --plain-windows 128
  stage_end=$((stage_end + 10))
  run table 5 "$python" bench/gpu_table.py "$figures"
}

stage_recipe() {
  export SLIDING_EVAL_STRIDE=256 VAL_MAX_TOKENS=1048576 MAX_WALLCLOCK_SECONDS=${TRAIN_SECONDS:-120} SEED=${SEED:-42}
  stage_end=$((stage_end - 10)) # for the line
  with_preset configs/pr640.env train "train pr640" "$(most 265)"
  train "train default" "$(most 265)"
  stage_end=$((stage_end + 10))
  run line 5 "$python" bench/gpu_table.py --recipe "$figures"
}

stage_systems() {
  local name seconds=${SYSTEM_SECONDS:-120} results=data/queue_systems
  local systems=("$python" bench/arms.py systems --data data/queue_sp --out "$results")
  make_shards 1024 || record shards "not run: no tokenizer of 1024 pieces, which most systems need"
  for name in ${SYSTEMS:-$(cd configs && printf '%s\n' default ./*.env | sed 's|./||; s|[.]env||; /^demo/d')}; do
    run "$name" $((seconds + 240)) "${systems[@]}" --full --seconds "$seconds" --only "$name"
  done
  run table 60 "${systems[@]}" --table
  for name in "$results"/logs/*.txt; do
    [[ ! -e $name ]] || printf '\n==== %s\n' "$name" && sed -n '/^python:[0-9]/,$p' "$name"
  done >>"$out/logs.txt"
}

[[ $alone && -n ${DATA_PATH:-} ]] || make_shards 8192 || die "no shards of the vocabulary of 8192"
stage_end=$((SECONDS + limit_s))
for stage; do
  file=${stage/levers/step} # $OUT may hold eight files
  [[ $# -eq 1 ]] || stage_end=$((SECONDS + limit_s))
  "stage_$stage"
done

printf '%s\n' '' '==== stage | part | outcome' "${report[@]}" | tee -a "$out/$file.txt"
[[ ! " ${report[*]} " =~ FAILED|not\ run ]]
