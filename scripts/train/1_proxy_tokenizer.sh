#!/usr/bin/env bash
# Stage 1: the proxy tokenizer, trained on uniformly random assignments so that it can reconstruct under any of them.
#
#   bash scripts/train/1_proxy_tokenizer.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# Reads the clips that data.sources names; writes run.dir (default results/<stage>/<config name>). Started again, it resumes.
# Example: bash scripts/train/1_proxy_tokenizer.sh configs/mini/proxy.yaml run.dir=results/mini/proxy

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
train_stage tokenizer.train "$@"
