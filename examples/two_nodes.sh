#!/usr/bin/env bash
# Training on several machines by hand: the same command on each of them, in a checkout that bash setup.sh has set up.
#
#   HEAD=10.0.0.1 NODES=2 bash examples/two_nodes.sh      HEAD: an address of the first machine that all of them reach
#
# GPUS: processes on each machine, one a GPU (8). PORT: of HEAD, free and open (29500). JOB: one name for all machines of a run
# (train). TRAIN_PYTHON: an interpreter instead of .venv's. Settings of train_gpt.py are environment variables, the same
# everywhere. Every machine has the data on a disk of its own or on a shared one; CHECKPOINT_DIR is on a shared one.
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "$0")")/.."

# torchrun's shared store makes restarted attempts fail (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CHECKPOINT_EVERY=${CHECKPOINT_EVERY:-600s} RESUME=${RESUME:-1}

exec "${TRAIN_PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes="${NODES:?how many machines}" --nproc-per-node="${GPUS:-8}" \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?address of the first machine}:${PORT:-29500}" --rdzv-id="${JOB:-train}" \
  --max-restarts="${RESTARTS:-3}" train_gpt.py
