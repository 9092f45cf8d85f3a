#!/usr/bin/env bash
# Class-to-video: sample clips of given classes; write videos, a grid for each class and samples.json.
#
#   bash scripts/test/sample_c2v_visualization.sh --tok-config T.yaml --vq-ckpt T --gpt-model GPT-LP --gpt-ckpt G --sample-dir OUT \
#       --cfg-scale 2.25 --per-proc-batch-size 8 --qual-num 20 --class-idx 1,JumpRope,71 --check-special-token-mask
#
# All flags: python -m autoregressive.sample_c2v --help. PRECISION=none|bf16|fp16 sets the precision of the GPT. GPUS=n
# starts n processes, each with its share of the clips (as RANK and WORLD_SIZE do). Rerun with the same --sample-dir to resume.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
sample autoregressive.sample_c2v "$@"
