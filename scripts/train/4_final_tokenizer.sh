#!/usr/bin/env bash
# Stage 4: train the final tokenizer from scratch on the assignments that the frozen router gives each clip.
#
#   bash scripts/train/4_final_tokenizer.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# Reads the clips of data.sources and the router of stage 3; writes run.dir. Rerun to resume.
# Example: bash scripts/train/4_final_tokenizer.sh configs/mini/final.yaml run.dir=results/mini/final

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
train_stage tokenizer.train "$@"
