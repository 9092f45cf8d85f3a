#!/usr/bin/env bash
# Stage 3: train the router, a classifier over all assignments, on the best assignment of each clip in the curated table.
#
#   bash scripts/train/3_router.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# Reads the tables of stage 2 and their clips; writes run.dir. One table serves every trade-off: quality_weight=0.8 ... 1.6.
# Rerun to resume.
# Example: bash scripts/train/3_router.sh configs/mini/router.yaml run.dir=results/mini/router

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
train_stage tokenizer.router.train "$@"
