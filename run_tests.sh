#!/usr/bin/env bash
# Lint and tests on any machine: sets up what is missing, then ruff, then pytest. Under 5 minutes on 2 cores.
#
#   bash run_tests.sh                everything
#   bash run_tests.sh -k packing     arguments go to pytest
set -euo pipefail
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"

cd "$ROOT"
bash setup.sh --quiet --no-data --tests
"$VENV_PYTHON" -m ruff check .
exec "$VENV_PYTHON" -m pytest --numprocesses "${TEST_PROCESSES:-2}" "$@"
