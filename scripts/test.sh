#!/usr/bin/env bash
# Install, then run the tests, without arguments on up to 4 processes. Arguments go to pytest.
#
#   bash scripts/test.sh [pytest arguments, e.g. -k assignment]

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
bash "$ROOT/scripts/env_install.sh"
cd "$ROOT"
# An unreachable hub would cost a minute of retries.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
[ $# -gt 0 ] || set -- --numprocesses auto --maxprocesses 4 --dist loadfile # files share costly fixtures
exec "$VENV/bin/python" -m pytest "$@"
