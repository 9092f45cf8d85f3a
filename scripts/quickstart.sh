#!/usr/bin/env bash
# Install, then reconstruct 30 real held-out clips: router -> tokens -> reconstructions and a report. Then sample clips of
# four classes with the miniature GPTs and continue rendered scenes from their first frames.
#
#   bash scripts/quickstart.sh
#
# Writes results/quickstart/, results/quickstart_samples/ and results/quickstart_frames/ and prints the paths of the three
# reports. Takes about a minute on 2 CPU cores after the installation.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
no_arguments "$@"
bash "$ROOT/scripts/env_install.sh"
cd "$ROOT"
# results of other weights cannot be resumed: remove them after an update
if [ -d results/quickstart ] && ! cmp -s ckpts/mini/SHA256SUMS results/.quickstart_weights; then
  echo "quick start: ckpts/mini has new weights; removing the results of the old ones (results/quickstart*)"
  rm -rf results/quickstart results/quickstart_samples results/quickstart_scenes results/quickstart_frames
fi
mkdir -p results/quickstart_clips
cp ckpts/mini/SHA256SUMS results/.quickstart_weights
cp tokenizer/data/bundled/{bottle,tree}_*.mp4 results/quickstart_clips/
"$VENV/bin/python" tokenizer/router/reconstruction_qual_with_router.py --vid_path results/quickstart_clips --save_dir results/quickstart \
  --router_config configs/mini/router.yaml --router_ckpt ckpts/mini/router.safetensors \
  --tok_config configs/mini/final.yaml --vq_ckpt ckpts/mini/final.safetensors --compare-uniform
bash scripts/test/sample_c2v_visualization.sh --tok-config configs/mini/final.yaml --vq-ckpt ckpts/mini/final.safetensors \
  --gpt-model GPT-mini --gpt-ckpt ckpts/mini/gpt_c2v.safetensors --sample-dir results/quickstart_samples --cfg-scale 2.25 \
  --qual-num 2 --class-idx "disc still,disc slide fast,bar pulse fast,real" --check-special-token-mask
"$VENV/bin/python" -m tokenizer.data.export results/quickstart_scenes --sources duotone:heldout:10 --lossless
bash scripts/test/frame_pred_visualization.sh --tok-config configs/mini/final.yaml --vq-ckpt ckpts/mini/final.safetensors \
  --gpt-model GPT-mini --gpt-ckpt ckpts/mini/gpt_fp.safetensors --vid_path results/quickstart_scenes --sample-num 10 \
  --sample-dir results/quickstart_frames --fixed-prefix "128,32" --condition-mode padding --check-special-token-mask
echo "Open these reports in a browser:"
echo "  tokens and reconstructions  $ROOT/results/quickstart/report.html"
echo "  clips of a class            $ROOT/results/quickstart_samples/report.html"
echo "  continued clips             $ROOT/results/quickstart_frames/report.html"
