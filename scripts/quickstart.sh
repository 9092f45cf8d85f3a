#!/usr/bin/env bash
# Set-up, then the main job: 30 real clips that no training run has seen -> router -> tokens -> reconstructions and a report.
# After it, the miniature GPTs: a few clips of four classes, and rendered scenes that go on from their first frames.
#
#   bash scripts/quickstart.sh
#
# Writes results/quickstart/, results/quickstart_samples/ and results/quickstart_frames/, and says at the end where the
# three reports are. Less than a minute on 2 CPU cores after the installation.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
no_arguments "$@"
bash "$ROOT/scripts/env_install.sh"
cd "$ROOT"
# what other weights made, before an update, would be refused as the beginning of this run
if [ -d results/quickstart ] && ! cmp -s ckpts/mini/SHA256SUMS results/.quickstart_weights; then
  echo "quick start: the weights in ckpts/mini are new; removing what the ones before made (results/quickstart*)"
  rm -rf results/quickstart results/quickstart_samples results/quickstart_scenes results/quickstart_frames
fi
mkdir -p results/quickstart_clips
cp ckpts/mini/SHA256SUMS results/.quickstart_weights
cp tokenizer/data/bundled/{bottle,tree}_*.mp4 results/quickstart_clips/
"$VENV/bin/python" tokenizer/router/reconstruction_qual_with_router.py --vid_path results/quickstart_clips --save_dir results/quickstart \
  --router_config configs/mini/router.yaml --router_ckpt ckpts/mini/router.safetensors \
  --tok_config configs/mini/final.yaml --vq_ckpt ckpts/mini/final.safetensors
bash scripts/test/sample_c2v_visualization.sh --tok-config configs/mini/final.yaml --vq-ckpt ckpts/mini/final.safetensors \
  --gpt-model GPT-mini --gpt-ckpt ckpts/mini/gpt_c2v.safetensors --sample-dir results/quickstart_samples --cfg-scale 2.25 \
  --qual-num 2 --class-idx "disc still,disc slide fast,bar pulse fast,real" --check-special-token-mask
"$VENV/bin/python" -m tokenizer.data.export results/quickstart_scenes --sources duotone:heldout:10 --lossless
bash scripts/test/frame_pred_visualization.sh --tok-config configs/mini/final.yaml --vq-ckpt ckpts/mini/final.safetensors \
  --gpt-model GPT-mini --gpt-ckpt ckpts/mini/gpt_fp.safetensors --vid_path results/quickstart_scenes --sample-num 10 \
  --sample-dir results/quickstart_frames --fixed-prefix "128,32" --condition-mode padding --check-special-token-mask
echo "Reports, to be opened in a browser:"
echo "  tokens and reconstructions  $ROOT/results/quickstart/report.html"
echo "  clips of a class            $ROOT/results/quickstart_samples/report.html"
echo "  continued clips             $ROOT/results/quickstart_frames/report.html"
