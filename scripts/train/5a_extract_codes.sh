#!/usr/bin/env bash
# Stage 5a: tokenize clips with the router's assignments into an archive for GPT training.
#
#   [WORKERS=n] bash scripts/train/5a_extract_codes.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# WORKERS=n starts n independent workers on the same shards; start, stop and restart more on any machine.
# PRECISION=none|bf16|fp16 overrides the config's precision.
# Check the result with: python -m autoregressive.token_archive check DIR
# Example: WORKERS=2 bash scripts/train/5a_extract_codes.sh configs/mini/extract_c2v.yaml

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
work_stage autoregressive.extract_codes "$@"
