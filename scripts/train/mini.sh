#!/usr/bin/env bash
# The miniature, all four stages on CPU: what made ckpts/mini. Kill it whenever you like; started again it goes on from there.
#
#   bash scripts/train/mini.sh
#
# Writes results/mini/{proxy,router,final}/ and the tables of stage 2, then the weights and their card into ckpts/mini/.
# At most 3 hours on 2 cores.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
no_arguments "$@"
cd "$ROOT"
python=$(project_python)

train() { # train SCRIPT NAME: skipped where NAME is finished
  local run=results/mini/$2
  [ ! -f "$run/final/model.safetensors" ] || { echo "mini: $2 is finished ($run)" && return; }
  echo "mini: $2" && bash "scripts/train/$1" "configs/mini/$2.yaml" run.dir="$run"
}
curate() { echo "mini: $1" && bash scripts/train/2_curate_router_data.sh "configs/mini/$1.yaml"; }

train 1_proxy_tokenizer.sh proxy
curate curate_train
curate curate_heldout
train 3_router.sh router
train 4_final_tokenizer.sh final

# Release: check the held-out figures and copy weights, configs and model card into ckpts/mini.
"$python" -m tokenizer.release
