#!/usr/bin/env bash
# Stage 1: train the proxy tokenizer on uniformly random assignments, so that it can reconstruct under any of them.
#
#   bash scripts/train/1_proxy_tokenizer.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# Reads the clips of data.sources; writes run.dir (default results/<stage>/<config name>). Rerun to resume.
# Example: bash scripts/train/1_proxy_tokenizer.sh configs/mini/proxy.yaml run.dir=results/mini/proxy

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
train_stage tokenizer.train "$@"
