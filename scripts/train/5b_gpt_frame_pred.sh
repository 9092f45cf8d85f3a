#!/usr/bin/env bash
# Stage 5b: train a GPT to continue given frames.
#
#   bash scripts/train/5b_gpt_frame_pred.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# Reads the archives of stage 5a (with condition_lengths); writes run.dir (default results/gpt/<config name>). Rerun to
# resume. Runs the loop of 5b_gpt_c2v.sh; the archive decides the task.
# Example: bash scripts/train/5b_gpt_frame_pred.sh configs/mini/gpt_fp.yaml run.dir=results/mini/gpt_fp

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
train_stage autoregressive.train "$@"
