#!/usr/bin/env bash
# Stage 5a: tokenize a set of clips once, with the router's assignments, into an archive that a GPT trains on.
#
#   [WORKERS=n] bash scripts/train/5a_extract_codes.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# WORKERS=n starts n independent workers over the same shards; more may be started elsewhere, killed and started again.
# PRECISION=none|bf16|fp16 sets precision= (default: the config's).
# Check the result with: python -m autoregressive.token_archive check DIR
# Example: WORKERS=2 bash scripts/train/5a_extract_codes.sh configs/mini/extract_c2v.yaml

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
work_stage autoregressive.extract_codes "$@"
