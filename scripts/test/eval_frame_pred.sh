#!/usr/bin/env bash
# FVD of frame prediction under a named protocol: the first frames are given, all frames are the model's own.
#
#   [WORKERS=n] bash scripts/test/eval_frame_pred.sh --protocol NAME --tok-config T.yaml --vq-ckpt T --gpt-model GPT-L \
#       --gpt-ckpt G --check-special-token-mask --out DIR [more flags]
#   bash scripts/test/eval_frame_pred.sh --protocol NAME --ours DIR_OF_SAMPLES --out DIR
#
# Prints and writes the protocol card; writes DIR/metrics.json, per_clip.csv and pictures. Stopped, it goes on from there;
# WORKERS=n shares the work among n processes, and more may be started elsewhere. All flags:
# python -m evaluations.frame_prediction --help. PRECISION=none|bf16|fp16.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
run_workers evaluations.frame_prediction "$@"
