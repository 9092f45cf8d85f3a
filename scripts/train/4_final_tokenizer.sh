#!/usr/bin/env bash
# Stage 4: the final tokenizer, trained from scratch with the assignments that the frozen router gives each clip.
#
#   bash scripts/train/4_final_tokenizer.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# Reads the clips of data.sources and the router of stage 3; writes run.dir. Started again, it resumes.
# Example: bash scripts/train/4_final_tokenizer.sh configs/mini/final.yaml run.dir=results/mini/final

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
train_stage tokenizer.train "$@"
