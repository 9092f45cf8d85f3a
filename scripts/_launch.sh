#!/usr/bin/env bash
# What the scripts share. Source it right after `set -euo pipefail`; `--help` is answered here, with the caller's own header.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
export VENV

for arg in "$@"; do
  case $arg in -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
done

die() {
  echo "error: $*" >&2
  exit 2
}

no_arguments() {
  [ $# -eq 0 ] || die "$(basename "$0") takes no arguments, got '$1' (see --help)"
}

# project_python: prints the interpreter to use, PYPATH (of set_env_vars.sh) or the one that env_install.sh made.
project_python() {
  command -v "${PYPATH:-$VENV/bin/python}" || die "no Python at ${PYPATH:-$VENV/bin/python}: run 'bash scripts/env_install.sh' or set PYPATH"
}

# check_stage_arguments CONFIG.yaml [key.sub=value ...] [--dry-run]
check_stage_arguments() {
  [ $# -gt 0 ] || die "$(basename "$0") needs a CONFIG.yaml (see --help)"
  [ -f "$1" ] || die "no config file '$1'"
  for arg in "${@:2}"; do
    case $arg in --dry-run | [a-z]*=*) ;; *) die "'$arg' is neither key.sub=value nor --dry-run (see --help)" ;; esac
  done
}

# train_stage MODULE CONFIG.yaml [...]: one training stage, in one process.
train_stage() {
  local module=$1 python
  shift
  check_stage_arguments "$@"
  [ "${GPUS:-1}" = 1 ] && [ "${NNODES:-1}" = 1 ] ||
    die "GPUS=${GPUS:-1} NNODES=${NNODES:-1}: training on several processes comes with the next milestone; unset them to train in one"
  python=$(project_python)
  exec "$python" -m "$module" "$1" ${PRECISION:+"run.precision=$PRECISION"} "${@:2}"
}

# run_workers MODULE [arguments]: WORKERS=n independent processes over the same work units, sharing the cores.
run_workers() {
  local module=$1 workers=${WORKERS:-1} worker pid python cores failed=0 pids=()
  shift
  [[ $workers =~ ^[1-9][0-9]*$ ]] || die "WORKERS must be a whole number of at least 1, got '$workers'"
  python=$(project_python)
  [ "$workers" -gt 1 ] || exec "$python" -m "$module" "$@"

  cores=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > workers ? cores / workers : 1))}
  trap 'kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM # bash hides Ctrl-C from processes in the background
  for ((worker = 0; worker < workers; worker++)); do
    "$python" -m "$module" "$@" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=$((failed + 1)); done
  [ "$failed" -eq 0 ] || die "$failed of $workers workers failed; run the same command again, finished units are kept"
}
