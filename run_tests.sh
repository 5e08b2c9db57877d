#!/usr/bin/env bash
# Lint and tests on any machine: sets up what is missing, then ruff, then pytest. 6 minutes on 2 cores (340 ms a step of the demo).
#
#   bash run_tests.sh                everything but the marked tests: it says how many these are, and how they are run
#   bash run_tests.sh -m campaign    these: a browser, transformers, a notebook, namespaces, what takes long
#   bash run_tests.sh -k packing     arguments go to pytest
#   WORK_DIR=FOLDER bash run_tests.sh    .venv and caches there: for a checkout that cannot be written
#
# TEST_PROCESSES: how many tests run at a time (2).
case $- in *p*) ;; *) POSIXLY_CORRECT=1 && \exec bash -p "$0" "$@" ;; esac # without what the user's shell exports
set -euo pipefail
# shellcheck source=tools/common.sh
source "$(dirname -- "$(readlink -f -- "$0")")/tools/common.sh"

[[ ${1:-} != -h && ${1:-} != --help ]] || { show_usage && exit; }
cd "$ROOT"
bash setup.sh --quiet --no-data --tests
"$VENV_PYTHON" -m ruff check .
exec "$VENV_PYTHON" -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist worksteal -m "not campaign" ${work:+-o "cache_dir=${work}.pytest_cache"} "$@"
