#!/usr/bin/env bash
# Reproduce the paper's claims in miniature: train, measure and report. Rerun to resume.
#
#   bash scripts/mini/reproduce.sh [--dry-run] [--only STAGE ...] [--from STAGE] [--scale mini|debug] [--jobs N] [--out DIR]
#
# Writes results/reproduce/report.html and figures.json. --dry-run lists the stages with their CPU minutes.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
cd "$ROOT"
python=$(project_python)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a stage uses one core, and equal threads give equal bits
exec "$python" scripts/mini/reproduce.py "$@"
