#!/usr/bin/env bash
# Measure rFVD, LPIPS, PSNR, SSIM and tokens of a tokenizer under a named protocol.
#
#   [WORKERS=n] bash scripts/test/eval_reconstruction.sh --protocol NAME --tok-config T.yaml --vq-ckpt T \
#       [--router-config R.yaml --router-ckpt R] --out DIR [more flags]
#
# Prints and writes the protocol card; writes DIR/metrics.json, per_clip.csv and pictures. Rerun to resume;
# WORKERS=n shares the work among n processes, and more can join from other machines. Protocols: python -m evaluations.protocols.
# All flags: python -m evaluations.reconstruction --help.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
run_workers evaluations.reconstruction "$@"
