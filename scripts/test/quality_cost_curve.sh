#!/usr/bin/env bash
# Measure quality over tokens and bytes: uniform, threshold, max-reward, routers, budgets, and H.264, H.265, AV1.
#
#   [WORKERS=n] bash scripts/test/quality_cost_curve.sh [options of python -m evaluations.quality_cost]
#
# Without options: the shipped miniature on its held-out clips, into results/quality_cost_mini. Writes points.csv, clips.csv, metrics.json,
# the charts and report.html. WORKERS=n shares the work among n processes; rerun to resume.
# --protocol NAME takes clips and networks from a named reconstruction protocol and adds its card to the result.
# Example: bash scripts/test/quality_cost_curve.sh --vq-ckpt T --router-ckpt R --table TABLE --extractor effnet --out DIR

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
[ $# -gt 0 ] || {
  cd "$ROOT"
  set -- --vq-ckpt ckpts/mini/final.safetensors --router-ckpt ckpts/mini/router.safetensors --table ckpts/mini/heldout_table.safetensors \
    --extractor effnet --force --out results/quality_cost_mini
}
run_workers evaluations.quality_cost "$@"
