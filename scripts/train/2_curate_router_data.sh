#!/usr/bin/env bash
# Stage 2: curation. The proxy reconstructs every clip under every assignment; LPIPS, PSNR and MSE go into one table.
#
#   [WORKERS=n] bash scripts/train/2_curate_router_data.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# WORKERS=n starts n independent workers on the same work units; start, stop and restart more on any machine.
# PRECISION=none|bf16|fp16 overrides the config's precision.
# Example: WORKERS=2 bash scripts/train/2_curate_router_data.sh configs/mini/curate_train.yaml

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
work_stage tokenizer.router.curate "$@"
