#!/usr/bin/env bash
# Frame prediction: continue real clips from their first frames; write videos beside the originals, a grid and samples.json.
#
#   bash scripts/test/frame_pred_visualization.sh --tok-config T.yaml --vq-ckpt T --gpt-model GPT-LP --gpt-ckpt G --dataset k600_val \
#       --sample-dir OUT --per-proc-batch-size 8 --orig-aspect-ratio --check-special-token-mask --sample-num 20 \
#       --fixed-prefix "512,128" --condition-mode padding
#
# --dataset k600_val reads K600_ROOT and K600_VAL_FILE; --vid_path DIR takes any folder of videos instead.
# All flags: python -m autoregressive.sample_frame_prediction --help. PRECISION, GPUS, RANK, WORLD_SIZE: see sample_c2v_visualization.sh.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
sample autoregressive.sample_frame_prediction "$@"
