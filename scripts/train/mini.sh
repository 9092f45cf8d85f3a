#!/usr/bin/env bash
# Train the miniature in ckpts/mini, all stages. Rerun to resume.
#
#   bash scripts/train/mini.sh
#
# Writes results/mini/{proxy,router,final,gpt_c2v,gpt_fp}/, the tables of stage 2 and the tokens of stage 5a; then copies the
# weights with their figures to ckpts/mini/. Stages 1 to 4 take about 80 minutes on 2 cores; for the GPTs see configs/README.md.
# Runs on the GPU if there is one.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
no_arguments "$@"
cd "$ROOT"
python=$(project_python)
# On CPU two one-core processes are faster than one of two cores. Use bf16 if the CPU has the instructions, and
# torch.compile if a compiler is installed.
read -r processes precision compile < <("$python" -c '
import torch
from tokenizer.common.device import missing_compiler
from tokenizer.common.device import pick_device, slow_precision
device = pick_device("auto")
precision = "none" if slow_precision(device, "bf16") else "bf16"
print(2 if device.type == "cpu" else 1, precision, "false" if missing_compiler(device) else "true")')

train() { # train SCRIPT NAME [PROCESSES [key=value ...]]: skip NAME if it is finished
  local run=results/mini/$2
  export GPUS=${3:-1}
  [ ! -f "$run/final/model.safetensors" ] || { echo "mini: $2 is finished ($run)" && return; }
  echo "mini: $2" && bash "scripts/train/$1" "configs/mini/$2.yaml" run.dir="$run" "${@:4}"
}
train_gpt() { # train_gpt SCRIPT NAME: batch_ids counts per process, so divide it to keep the ids of a step
  local ids
  ids=$(sed -n 's/^batch_ids: //p' "configs/mini/$2.yaml")
  train "$@" "$processes" batch_ids=$((ids / processes)) run.precision="$precision" run.compile="$compile"
}
curate() { echo "mini: $1" && WORKERS=2 bash scripts/train/2_curate_router_data.sh "configs/mini/$1.yaml"; }

train 1_proxy_tokenizer.sh proxy "$processes"
curate curate_train
curate curate_select
curate curate_heldout
train 3_router.sh router
train 4_final_tokenizer.sh final "$processes"

# Release: measure on held-out clips, copy weights, figures and model card into ckpts/mini.
"$python" scripts/mini/release.py tokenizer
"$python" scripts/mini/readme_figure.py

extract() { echo "mini: $1" && WORKERS=2 bash scripts/train/5a_extract_codes.sh "configs/mini/$1.yaml"; }

for set in extract_c2v extract_c2v_heldout extract_fp extract_fp_heldout; do extract "$set"; done
train_gpt 5b_gpt_c2v.sh gpt_c2v
train_gpt 5b_gpt_frame_pred.sh gpt_fp
"$python" scripts/mini/release.py generation
