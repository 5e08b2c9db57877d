# shellcheck shell=bash disable=SC2034 # the scripts that source it use what looks unused here
# What the scripts share; they source it. It exports the keys of a preset, where things lie, and nothing else.
#
# Whoever starts a script may have told bash, Python, pip, git or pytest by variables, options, functions or aliases to
# behave otherwise; here, and nowhere else, that is undone. First, each script's own first line starts it again as
# `bash -p`, which leaves out exported functions, BASH_ENV, SHELLOPTS (noclobber, nounset, posix), BASHOPTS (failglob),
# CDPATH and GLOBIGNORE, and turns `sh run_demo.sh` into bash; the rest is leave_out_variables below. What says where
# packages come from, which devices and how many threads to use (PIP_INDEX_URL, proxies, CUDA_VISIBLE_DEVICES,
# OMP_NUM_THREADS) is left as it is.

unset POSIXLY_CORRECT # first: before 5.1 bash reads `< <(...)` as a mistake where it is set
SCRIPT=$(readlink -f -- "$0") # not the link that it may have been started by
ROOT=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  echo "common.sh: the scripts source it; it is not a command: see bash run_demo.sh --help" >&2
  exit 2
fi

# bash -p does not take exported functions over, but hands them on to the programs it starts, and a python may be a bash
# script (pyenv's are). Only a program that starts another one can leave them out: once, since a value may look like one.
functions=()
while [[ -z ${FUNCTIONS_LEFT_OUT:-} ]] && IFS= read -r line; do
  [[ $line == BASH_FUNC_*%%=* ]] && functions+=(-u "${line%%=*}")
done < <(env)
((${#functions[@]} == 0)) || exec env "${functions[@]}" FUNCTIONS_LEFT_OUT=1 bash -p "$0" "$@"

# A line for the person at the terminal; stdout stays free for results.
say() { printf '%s: %s\n' "${SCRIPT##*/}" "$*" >&2; }

# An error of the user's making: one line, exit code 2.
die() {
  say "error: $*"
  exit 2
}

# Print the comment at the head of the script: its usage.
show_usage() {
  local line
  while IFS= read -r line && [[ $line == '#'* ]]; do
    [[ $line == '#!'* ]] && continue
    line=${line#\#}
    printf '%s\n' "${line# }"
  done <"$SCRIPT"
}

# ---- The user's variables

# unset_all_but PREFIX NAME...: the variables that begin with PREFIX, but for the names.
unset_all_but() {
  local name
  for name in $(compgen -A variable "$1"); do
    [[ " ${*:2} " == *" $name "* ]] || unset "$name"
  done
}

leave_out_variables() {
  # What bash -p does not read, a bash that is started from here would.
  unset BASH_ENV ENV CDPATH GLOBIGNORE
  export -n SHELLOPTS BASHOPTS
  # BASH_COMPAT: other rules for bash, as POSIXLY_CORRECT is, for coreutils too. GREP_OPTIONS changes every grep.
  unset BASH_COMPAT GREP_OPTIONS
  # Other modules (PYTHONPATH: setup.sh would take another project's packages for its own; PYTHONSAFEPATH hides those
  # beside a tool), another library (PYTHONHOME), other rules (PYTHONWARNINGS=error, PYTHONOPTIMIZE=2, PYTHONINSPECT,
  # PYTHONUTF8, PYTHONIOENCODING). An interpreter of the user's own may need the first (a cluster's modules set PYTHONPATH).
  local own=(PYTHONPATH PYTHONHOME PYTHONUSERBASE PYTHONNOUSERSITE PYTHONPLATLIBDIR)
  [[ -n ${TRAIN_PYTHON:-} ]] || own=()
  unset_all_but PYTHON PYTHON PYTHONDONTWRITEBYTECODE PYTHONFAULTHANDLER PYTHONHASHSEED PYTHONPYCACHEPREFIX PYTHONUNBUFFERED \
    ${own[@]+"${own[@]}"}
  unset __PYVENV_LAUNCHER__ _PYTHON_HOST_PLATFORM _PYTHON_PROJECT_BASE _PYTHON_SYSCONFIGDATA_NAME
  # pip: kept is where packages come from and how they are reached, and not where they go (PIP_USER, PIP_TARGET,
  # PIP_PREFIX), which (PIP_CONSTRAINT, set in NVIDIA's images), or how (PIP_NO_DEPS, PIP_REQUIRE_HASHES, PIP_NO_BINARY).
  unset_all_but PIP_ PIP_CACHE_DIR PIP_CERT PIP_CLIENT_CERT PIP_CONFIG_FILE PIP_DEFAULT_TIMEOUT PIP_EXTRA_INDEX_URL \
    PIP_FIND_LINKS PIP_INDEX_URL PIP_KEYRING_PROVIDER PIP_NO_CACHE_DIR PIP_NO_INDEX PIP_PROXY PIP_RETRIES PIP_TIMEOUT PIP_TRUSTED_HOST
  # Another repository than the one a file lies in: set in git's hooks, where run_tests.sh may well be called.
  unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_COMMON_DIR \
    GIT_NAMESPACE GIT_PREFIX GIT_EXTERNAL_DIFF
  # Options and plugins of another project's tests (PYTEST_DISABLE_PLUGIN_AUTOLOAD hides pytest-xdist); ruff's likewise.
  unset_all_but PYTEST_
  unset_all_but RUFF_ RUFF_CACHE_DIR
}

# A folder for temporary files that is gone, or somebody else's, fails in mktemp only. Relative to where the user stands.
check_tmpdir() {
  [[ -n ${TMPDIR:-} ]] || return 0
  if [[ -d $TMPDIR && -w $TMPDIR ]]; then
    TMPDIR=$(cd -- "$TMPDIR" && pwd)
  else
    say "TMPDIR=$TMPDIR: not a folder that can be written; the system's is used"
    unset TMPDIR
  fi
}

# FUNCNEST=1 forbids functions that call others; with TMOUT `read` gives up on a trainer that is silent.
unset FUNCNEST TMOUT
leave_out_variables
check_tmpdir

# ---- Where things lie

# What stands before .venv, data/ and logs/ in a path. Nothing: they are relative to $ROOT, since logs hold paths and should
# hold no local ones. WORK_DIR, relative to $ROOT too, names another folder for all of it.
work=''
if [[ -n ${WORK_DIR:-} ]]; then
  [[ $WORK_DIR == /* ]] || WORK_DIR=$ROOT/$WORK_DIR
  work=${WORK_DIR%/}/
  export WORK_DIR LOG_DIR=${LOG_DIR-${work}logs}
  # train_gpt.py would keep them in data/compile_cache, pytest, ruff and hypothesis beside what they read
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR-${work}data/compile_cache/torchinductor}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR-${work}data/compile_cache/triton}
  export RUFF_CACHE_DIR=${RUFF_CACHE_DIR-${work}.ruff_cache}
  export HYPOTHESIS_STORAGE_DIRECTORY=${HYPOTHESIS_STORAGE_DIRECTORY-${work}.hypothesis}
fi
VENV=${work:-$ROOT/}.venv # made by setup.sh
VENV_PYTHON=$VENV/bin/python

# make_folder FOLDER: end with the line that says what helps where it cannot be made or written.
make_folder() {
  mkdir -p -- "$1" 2>/dev/null && [[ -w $1 ]] ||
    die "$1: cannot be written; WORK_DIR=FOLDER takes .venv, data, logs and artifacts elsewhere"
}

# Whether the driver shows a GPU; needs no Python, so it can be asked before anything is installed.
has_nvidia_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == *GPU\ * ]]; }

# Set $python to an interpreter that has what train_gpt.py needs: TRAIN_PYTHON, or .venv's, which setup.sh makes or mends.
choose_python() {
  local problem
  python=${TRAIN_PYTHON:-$VENV_PYTHON}
  if [[ -z ${TRAIN_PYTHON:-} ]]; then
    bash setup.sh --quiet --no-data
    return
  fi
  command -v -- "$python" >/dev/null || die "TRAIN_PYTHON=$python: no such program"
  problem=$("$python" tools/check_setup.py absent torch numpy sentencepiece 2>/dev/null) ||
    die "TRAIN_PYTHON=$python: does not run as Python 3.10 or later"
  [[ -z $problem ]] ||
    die "TRAIN_PYTHON=$python has no ${problem//$'\n'/, }; without TRAIN_PYTHON setup.sh installs what is missing"
}

# ---- Presets

# load_preset FILE: export its KEY=VALUE lines, except keys that the environment already has (an empty value counts), and
# in PRESET_SETTINGS the names it exported: what a preset says is not what the user said.
load_preset() {
  local line key LC_ALL=C # [A-Z] are 26 letters
  export PRESET_SETTINGS=''
  [[ -r $1 ]] || die "preset $1: no such file"
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line%$'\r'} # of an editor on Windows
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^([A-Z][A-Z0-9_]*)=([^[:space:]]*)$ ]] || die "preset $1: '$line' is neither KEY=VALUE nor a comment"
    key=${BASH_REMATCH[1]}
    [[ -n ${!key+set} ]] || export "$key=${BASH_REMATCH[2]}" PRESET_SETTINGS="${PRESET_SETTINGS:+$PRESET_SETTINGS }$key"
  done <"$1"
}

# load_demo_preset PYTHON: the demo's preset for this machine; sets $preset to its path.
load_demo_preset() {
  preset=configs/demo.env
  if has_nvidia_gpu && "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    preset=configs/demo_gpu.env
  fi
  load_preset "$preset"
  demo_folder=${work}data/demo_sp$VOCAB_SIZE
}

# make_demo_data PYTHON: make the demo corpus for VOCAB_SIZE in $demo_folder, unless it is there and whole.
make_demo_data() {
  [[ -e $demo_folder/manifest.json ]] || say "making the demo corpus in $demo_folder (less than a minute)"
  "$1" tools/prepare_data.py demo --out "$demo_folder" --vocab-size "$VOCAB_SIZE" >/dev/null
}
