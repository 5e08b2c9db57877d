#!/usr/bin/env bash
# Training on several machines by hand: the same command on each of them, in a checkout that bash setup.sh has set up.
#
#   HEAD=10.0.0.1 NODES=2 bash examples/two_nodes.sh      HEAD: an address of the first machine that all of them reach
#
# GPUS: processes on each machine, one a GPU (8). PORT: of HEAD, free and open (29500). JOB: one name for all machines of a run
# (train). TRAIN_PYTHON: an interpreter instead of .venv's. Settings of train_gpt.py are environment variables, the same
# everywhere; further words go to torchrun. Every machine has the data on a disk of its own or on a shared one; CHECKPOINT_DIR is on a shared one.
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "$0")")/.."

# torchrun's shared store makes restarted attempts fail (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CHECKPOINT_EVERY=${CHECKPOINT_EVERY:-600s} RESUME=${RESUME:-1}

# a signal that warns of a limit (SLURM's USR1) reaches the trainers through torchrun, which else dies of it; then a step and a checkpoint
# have 100 seconds. An older torchrun does not know these two.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1} PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-100}

# torchrun waits for HEAD's store without a limit of its own: behind a cut network it does not even see that its trainers have ended.
# One that has nothing but ended trainers for 30 seconds is killed.
run=$$
(
  ended=0
  while sleep 2 && [[ $(ps -o state= -p "$run") == [!Z]* ]]; do
    if [[ $(ps -o state= --ppid "$run" | sort -u) == Z ]]; then ended=$((ended + 2)); else ended=0; fi
    if ((ended >= 30)); then
      echo "two_nodes.sh: torchrun has not noticed for 30 s that its trainers have ended (is the network cut?): it is killed" >&2
      kill -KILL "$run"
    fi
  done 2>&1 | grep --line-buffered '^two_nodes' >&2 &
) >/dev/null

exec "${TRAIN_PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes="${NODES:?how many machines}" --nproc-per-node="${GPUS:-8}" \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?address of the first machine}:${PORT:-29500}" --rdzv-id="${JOB:-train}" \
  --max-restarts="${RESTARTS:-3}" "$@" train_gpt.py
