#!/usr/bin/env bash
# Stage 2: curation. The proxy reconstructs every clip under every assignment; LPIPS, PSNR and MSE go into one table.
#
#   [WORKERS=n] bash scripts/train/2_curate_router_data.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# WORKERS=n starts n independent workers over the same work units; more may be started elsewhere, killed and started again.
# Example: WORKERS=2 bash scripts/train/2_curate_router_data.sh configs/mini/curate_train.yaml

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
check_stage_arguments "$@"
workers=${WORKERS:-1}
[[ $workers =~ ^[1-9][0-9]*$ ]] || die "WORKERS must be a whole number of at least 1, got '$workers'"
python=$(project_python)
[ "$workers" -gt 1 ] || exec "$python" -m tokenizer.router.curate "$@"

cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > workers ? cores / workers : 1))}
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM # bash hides Ctrl-C from processes in the background
for ((worker = 0; worker < workers; worker++)); do
  "$python" -m tokenizer.router.curate "$@" &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=$((failed + 1)); done
[ "$failed" -eq 0 ] || die "$failed of $workers workers failed; run the same command again, finished units are kept"
