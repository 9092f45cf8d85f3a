#!/usr/bin/env bash
# Measure FVD of frame prediction under a named protocol: the first frames are given, and all frames are generated.
#
#   [WORKERS=n] bash scripts/test/eval_frame_pred.sh --protocol NAME --tok-config T.yaml --vq-ckpt T --gpt-model GPT-L \
#       --gpt-ckpt G --check-special-token-mask --out DIR [more flags]
#   bash scripts/test/eval_frame_pred.sh --protocol NAME --ours DIR_OF_SAMPLES --out DIR
#
# Prints and writes the protocol card; writes DIR/metrics.json, per_clip.csv and pictures. Rerun to resume;
# WORKERS=n shares the work among n processes, and more can join from other machines. All flags:
# python -m evaluations.frame_prediction --help. PRECISION=none|bf16|fp16.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
run_workers evaluations.frame_prediction "$@"
