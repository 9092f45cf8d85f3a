#!/usr/bin/env bash
# Stage 5b: train a class-to-video GPT on the tokens of labelled clips.
#
#   bash scripts/train/5b_gpt_c2v.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# Reads the archives of stage 5a; writes run.dir (default results/gpt/<config name>). Rerun to resume.
# Example: bash scripts/train/5b_gpt_c2v.sh configs/mini/gpt_c2v.yaml run.dir=results/mini/gpt_c2v

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
train_stage autoregressive.train "$@"
