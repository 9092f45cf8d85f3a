#!/usr/bin/env bash
# Functions shared by the scripts. Source it right after `set -euo pipefail`; --help prints the header of the calling script.

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

# project_python: print the interpreter: PYPATH (see scripts/set_env_vars_template.sh), else that of env_install.sh.
project_python() {
  command -v "${PYPATH:-$VENV/bin/python}" || die "no Python at ${PYPATH:-$VENV/bin/python}: run 'bash scripts/env_install.sh' or set PYPATH"
}

# check_stage_arguments CONFIG.yaml [key.sub=value ...] [--dry-run] [--overfit-one-batch] [--global-batch-size=N]
check_stage_arguments() {
  [ $# -gt 0 ] || die "$(basename "$0") needs a CONFIG.yaml (see --help)"
  [ -f "$1" ] || die "no config file '$1'"
  for arg in "${@:2}"; do
    case $arg in
      --dry-run | --overfit-one-batch | --global-batch-size=* | [a-z]*=*) ;;
      *) die "'$arg' is neither key.sub=value nor --dry-run (see --help)" ;;
    esac
  done
}

# whole_number NAME MINIMUM: exit unless the variable NAME holds a whole number of at least MINIMUM.
whole_number() {
  [[ ${!1} =~ ^[0-9]+$ ]] && [ "${!1}" -ge "$2" ] || die "$1 must be a whole number of at least $2, got '${!1}'"
}

# share_cores N: divide the cores among N processes of this machine, unless OMP_NUM_THREADS is set.
share_cores() {
  local cores
  cores=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}

# train_stage MODULE CONFIG.yaml [...]: run one training stage on GPUS processes of each of NNODES machines (default 1, 1).
# MAX_RESTARTS=n (default 0): if a process dies, restart and resume all of them, at most n times.
# Under srun every task runs this function and reads its rank from SLURM (scripts/slurm/train.sbatch).
train_stage() {
  local module=$1 python
  shift
  check_stage_arguments "$@"
  GPUS=${GPUS:-1} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
  whole_number GPUS 1
  whole_number NNODES 1
  whole_number NODE_RANK 0
  [ "$NODE_RANK" -lt "$NNODES" ] || die "NODE_RANK=$NODE_RANK: machines are numbered from 0, and NNODES=$NNODES"
  python=$(project_python)
  set -- "$1" ${PRECISION:+"run.precision=$PRECISION"} "${@:2}"
  [ "$((GPUS * NNODES))" -gt 1 ] || exec "$python" -m "$module" "$@"

  local rendezvous=(--standalone)
  # new store and port for every restart: torchrun's shared store still holds the addresses of dead processes
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  if [ "$NNODES" -gt 1 ]; then
    [ -n "${MASTER_ADDR:-}" ] || die "NNODES=$NNODES needs MASTER_ADDR, the name of the machine with NODE_RANK=0"
    rendezvous=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
  fi
  share_cores "$GPUS"
  exec "$python" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$GPUS" "${rendezvous[@]}" \
    --max-restarts "${MAX_RESTARTS:-0}" -m "$module" "$@"
}

# sample MODULE [arguments]: run a sampling command on GPUS=n processes (default 1); each samples its share of the clips.
sample() {
  local module=$1 python
  shift
  [ -z "${WORKERS:-}" ] || die "WORKERS applies to evaluation, curation and extraction; to sample with several processes set GPUS=n"
  GPUS=${GPUS:-1}
  whole_number GPUS 1
  python=$(project_python)
  [ "$GPUS" -gt 1 ] || exec "$python" -m "$module" "$@"
  share_cores "$GPUS"
  exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m "$module" "$@"
}

# work_stage MODULE CONFIG.yaml [...]: run stage 2 or 5a on WORKERS processes, in PRECISION if that is set.
work_stage() {
  local module=$1
  shift
  check_stage_arguments "$@"
  run_workers "$module" "$1" ${PRECISION:+"precision=$PRECISION"} "${@:2}"
}

# run_workers MODULE [arguments]: start WORKERS=n independent processes on the same work units; they share cores and GPUs.
run_workers() {
  local module=$1 workers=${WORKERS:-1} worker pid python failed=0 pids=()
  shift
  [[ $workers =~ ^[1-9][0-9]*$ ]] || die "WORKERS must be a whole number of at least 1, got '$workers'"
  python=$(project_python)
  [ "$workers" -gt 1 ] || exec "$python" -m "$module" "$@"

  share_cores "$workers"
  trap 'kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM # background processes do not receive Ctrl-C
  for ((worker = 0; worker < workers; worker++)); do
    LOCAL_RANK=$((${SLURM_LOCALID:-0} * workers + worker)) "$python" -m "$module" "$@" & # selects its GPU, see pick_device
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=$((failed + 1)); done
  [ "$failed" -eq 0 ] || die "$failed of $workers workers failed; rerun the same command, finished units are kept"
}
