#!/usr/bin/env bash
# Stage 2: curation. The proxy reconstructs every clip under every assignment; LPIPS, PSNR and MSE go into one table.
#
#   [WORKERS=n] bash scripts/train/2_curate_router_data.sh CONFIG.yaml [key.sub=value ...] [--dry-run]
#
# WORKERS=n starts n independent workers over the same work units; more may be started elsewhere, killed and started again.
# PRECISION=none|bf16|fp16 sets precision= (default: the config's).
# Example: WORKERS=2 bash scripts/train/2_curate_router_data.sh configs/mini/curate_train.yaml

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
work_stage tokenizer.router.curate "$@"
