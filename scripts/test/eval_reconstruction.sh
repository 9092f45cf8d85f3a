#!/usr/bin/env bash
# rFVD, LPIPS, PSNR, SSIM and tokens of a tokenizer under a named protocol.
#
#   [WORKERS=n] bash scripts/test/eval_reconstruction.sh --protocol NAME --tok-config T.yaml --vq-ckpt T \
#       [--router-config R.yaml --router-ckpt R] --out DIR [more flags]
#
# Prints and writes the protocol card; writes DIR/metrics.json, per_clip.csv and pictures. Stopped, it goes on from there;
# WORKERS=n shares the work among n processes, and more may be started elsewhere. python -m evaluations.protocols lists the protocols,
# python -m evaluations.reconstruction --help all flags.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
run_workers evaluations.reconstruction "$@"
