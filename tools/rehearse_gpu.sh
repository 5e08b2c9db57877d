#!/usr/bin/env bash
# Rehearse the first contact with a GPU on a machine without one: everything compiles and is launched, nothing computes.
#
#   bash tools/rehearse_gpu.sh RIG [MODE]
#
#   runs      train_gpt.py from start to end, uncompiled, hand-written kernels launched: the default and each preset   20 min
#   graphs    the same, compiled by Inductor, with two layers and one micro-batch: the default and the presets         20 min
#   faults    a kernel that raises, one that cannot be launched, compilers that fail, broken attention libraries:
#             the run goes on to its result, with what is at fault switched off and named                               5 min
#   first     bench/gpu_queue.sh first, with one layer                                                                 15 min
#   all       all of them; without MODE: runs and faults
#
# RIG is a folder with a CUDA build of PyTorch and Triton over libraries that pose as an idle H100: `site` (packages),
# `stub` (the libraries) and `python` (a file that names the interpreter). What a run prints goes to data/rehearsal (OUT),
# a line for each to the terminal; the exit code is 1 if one of them did not end as it should. ONLY="default pr640": these; "a_kernel_that_raises": that fault.
#
# The program that runs is a copy in which the verdicts on values are replaced, since no kernel writes a value: see EDITS in
# tools/rehearse_gpu.py. Values are the tests' business, and the GPU's. Minutes: one core of two.
case $- in *p*) ;; *) POSIXLY_CORRECT=1 && \exec bash -p "$0" "$@" ;; esac # without what the user's shell exports
set -euo pipefail
# shellcheck source=tools/common.sh
source "$(dirname -- "$(readlink -f -- "$0")")/common.sh"

[[ "$*" != -h && "$*" != --help ]] || { show_usage && exit; }
[[ $# -eq 1 || $# -eq 2 ]] || die "$# arguments: expected RIG [MODE]"
[[ -f $1/python && -d $1/site && -d $1/stub ]] || die "RIG=$1: expected a folder with site/, stub/ and python"
rig=$(cd -- "$1" && pwd)
mode=${2:-runs faults}
[[ " runs graphs faults first all runs faults " == *" $mode "* ]] || die "MODE=$mode: expected runs, graphs, faults, first or all"
cd -- "$ROOT"
# Nothing of the caller's environment: -S keeps the machine's own packages out. Without PyTorch's cache of device memory
# every allocation is new, so that what a kernel should have written is 0.
# shellcheck disable=SC2086 # the modes are words
exec env -i PATH="$PATH" HOME="${HOME:-/}" LANG=C.UTF-8 OMP_NUM_THREADS=1 ${OUT:+"OUT=$OUT"} ${ONLY:+"ONLY=$ONLY"} \
  PYTHONPATH="$rig/site" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 LD_LIBRARY_PATH="$rig/stub" TRITON_LIBCUDA_PATH="$rig/stub" \
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 TORCHINDUCTOR_COMPILE_THREADS=1 "$(cat -- "$rig/python")" -S tools/rehearse_gpu.py $mode
