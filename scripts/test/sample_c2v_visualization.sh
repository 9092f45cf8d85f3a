#!/usr/bin/env bash
# Class-to-video: sample clips of given classes, decode them, write videos, a grid for each class and samples.json.
#
#   bash scripts/test/sample_c2v_visualization.sh --tok-config T.yaml --vq-ckpt T --gpt-model GPT-LP --gpt-ckpt G --sample-dir OUT \
#       --cfg-scale 2.25 --per-proc-batch-size 8 --qual-num 20 --class-idx 1,JumpRope,71 --check-special-token-mask
#
# All flags: python -m autoregressive.sample_c2v --help. PRECISION=none|bf16|fp16 sets the arithmetic of the GPT; GPUS=n
# starts n processes; each samples its own share, as with RANK and WORLD_SIZE set. Started again with the same --sample-dir, it goes on.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
sample autoregressive.sample_c2v "$@"
