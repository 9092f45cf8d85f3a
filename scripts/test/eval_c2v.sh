#!/usr/bin/env bash
# Measure gFVD of class-to-video under a named protocol: one sample for each real clip, of that clip's class.
#
#   [WORKERS=n] bash scripts/test/eval_c2v.sh --protocol NAME --tok-config T.yaml --vq-ckpt T --gpt-model GPT-L \
#       --gpt-ckpt G --cfg-scale 1.75 --check-special-token-mask --out DIR [more flags]
#   bash scripts/test/eval_c2v.sh --protocol NAME --ours DIR_OF_SAMPLES --out DIR
#
# Prints and writes the protocol card; writes DIR/metrics.json, per_clip.csv and pictures. Rerun to resume;
# WORKERS=n shares the work among n processes, and more can join from other machines. All flags:
# python -m evaluations.class_to_video --help. PRECISION=none|bf16|fp16.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
run_workers evaluations.class_to_video "$@"
