#!/usr/bin/env bash
# Everything that waits for a GPU, in one command; figures go to $OUT (default: data/gpu_queue).
#
#   CORPUS=FOLDER bash bench/gpu_queue.sh    FOLDER holds corpus_train_*.jsonl.xz, corpus_val.jsonl.xz, tokenizers/
#
# Uses the python that has torch (PYTHON, default python3); installs sentencepiece where it is missing. Takes about 6 minutes on
# one H100: shards, parity of losses, ten steps of the default model, two minutes of it with its round trip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} out=${OUT:-data/gpu_queue} corpus=${CORPUS:?the folder with corpus_train_*.jsonl.xz and tokenizers/}
shards=data/corpus_sp8192
mkdir -p "$out"
"$python" -c 'import sentencepiece' 2>/dev/null || "$python" -m pip install --quiet sentencepiece==0.2.1

[[ -e $shards/manifest.json ]] || "$python" tools/prepare_data.py text "$corpus"/corpus_train_*.jsonl.xz \
  --val "$corpus/corpus_val.jsonl.xz" --tokenizer "$corpus/tokenizers/fineweb_8192_bpe.model" --out "$shards"
export DATA_PATH=$shards TOKENIZER_PATH=$corpus/tokenizers/fineweb_8192_bpe.model ARTIFACT_PATH=$out/model.ptz

"$python" bench/parity.py | tee "$out/parity.txt"
RUN_ID=gpu_10_steps ITERATIONS=10 TRAIN_LOG_EVERY=1 SLIDING_EVAL=0 MAX_WALLCLOCK_SECONDS=0 "$python" train_gpt.py | tee "$out/steps.txt"
RUN_ID=gpu_2_minutes MAX_WALLCLOCK_SECONDS=120 SLIDING_EVAL_STRIDE=256 "$python" train_gpt.py | tee "$out/two_minutes.txt"
cp logs/gpu_10_steps.txt logs/gpu_2_minutes.txt "$out/"
rm -f "$out/model.ptz"
