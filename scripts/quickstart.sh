#!/usr/bin/env bash
# Set-up, then the main job: 30 real clips that no training run has seen -> router -> tokens -> reconstructions and a report.
#
#   bash scripts/quickstart.sh
#
# Writes results/quickstart/ and says at the end where the report is. About a minute on 2 CPU cores after the installation.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
no_arguments "$@"
bash "$ROOT/scripts/env_install.sh"
cd "$ROOT"
mkdir -p results/quickstart_clips
cp tokenizer/data/bundled/{bottle,tree}_*.mp4 results/quickstart_clips/
"$VENV/bin/python" tokenizer/router/reconstruction_qual_with_router.py --vid_path results/quickstart_clips --save_dir results/quickstart \
  --router_config configs/mini/router.yaml --router_ckpt ckpts/mini/router.safetensors \
  --tok_config configs/mini/final.yaml --vq_ckpt ckpts/mini/final.safetensors
echo "The report: $ROOT/results/quickstart/report.html (open it in a browser)"
