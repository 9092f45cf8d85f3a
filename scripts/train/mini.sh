#!/usr/bin/env bash
# Train the miniature in ckpts/mini, all stages. Rerun to resume.
#
#   bash scripts/train/mini.sh
#
# Writes results/mini/{proxy,router,final,gpt_c2v,gpt_fp}/, the tables of stage 2 and the tokens of stage 5a; then copies the
# weights with their figures to ckpts/mini/. Stages 1 to 4 take about 80 minutes on 2 cores; for the GPTs see configs/README.md.
# Runs on the GPU if there is one.
#
# RECIPE=mini/next   the next miniature: configs/mini/next into results/next, without a release. Its clips are rendered once
#                    into results/next/data (extra [scenes]); copy that folder to a machine that cannot render. PACK="--crf 22"
#                    compresses them. Photographs come from packages (scripts/mini/photos.py: Debian, pip), unless
#                    results/next/photos is there already.
# STAGES="1 2 3 4"   only these stages (0 is the rendering; default all)
# MINUTES=12         for a borrowed GPU: stages 1 and 4 take 28 % of the time each, at a constant rate and then annealed,
#                    instead of the steps of their config

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"
no_arguments "$@"
cd "$ROOT"
python=$(project_python)
# On CPU two one-core processes are faster than one of two cores. Use bf16 if the CPU has the instructions, and
# torch.compile if a compiler is installed.
read -r processes precision compile < <("$python" -c '
import torch
from tokenizer.common.device import missing_compiler
from tokenizer.common.device import pick_device, slow_precision
device = pick_device("auto")
precision = "none" if slow_precision(device, "bf16") else "bf16"
print(2 if device.type == "cpu" else 1, precision, "false" if missing_compiler(device) else "true")')

recipe=${RECIPE:-mini} stages=${STAGES:-0 1 2 3 4 5}
results=results/$(basename "$recipe")
[ -f "configs/$recipe/proxy.yaml" ] || die "RECIPE=$recipe: no configs/$recipe/proxy.yaml"
[ -z "${MINUTES:-}" ] || whole_number MINUTES 1
loaders=() faster=() larger=() # a GPU takes larger batches at almost the same time, and more processes must load them
if [ "$processes" -eq 1 ]; then
  loaders=(run.num_workers="$(($(getconf _NPROCESSORS_ONLN) > 3 ? $(getconf _NPROCESSORS_ONLN) - 2 : 1))")
  faster=(run.batch_size=64 optim.lr=3e-4 optim.min_lr=3e-6 "${loaders[@]}") larger=(clips_per_unit=64)
fi

stage() { [[ " $stages " == *" $1 "* ]]; }
done_already() { [ ! -f "$results/$1/final/model.safetensors" ] || echo "mini: $1 is finished ($results/$1)"; }
train() { # train SCRIPT NAME [PROCESSES [key=value ...]]: skip NAME if it is finished
  export GPUS=${3:-1}
  [ -z "$(done_already "$2")" ] || { done_already "$2" && return; }
  echo "mini: $2" && bash "scripts/train/$1" "configs/$recipe/$2.yaml" run.dir="$results/$2" "${@:4}"
}
train_tokenizer() { # train_tokenizer SCRIPT NAME: all its steps, or within its share of MINUTES
  local steps most=1000000
  [ "$recipe" != mini ] || { train "$@" "$processes" && return; }
  set -- "$@" "$processes" run.precision="$precision" "${faster[@]}"
  [ -n "${MINUTES:-}" ] || { train "$@" && return; }
  [ -z "$(done_already "$2")" ] || { done_already "$2" && return; }
  # Five sixths of the time at a constant rate until SIGTERM, which saves; then a fifth more steps to anneal.
  # --foreground: the signal is for the training alone, not for the processes that load its clips.
  GPUS=$processes timeout --foreground --signal=TERM "$((MINUTES * 60 * 28 / 120))" \
    bash "scripts/train/$1" "configs/$recipe/$2.yaml" run.dir="$results/$2" run.steps=$most run.validate_every=$most \
    run.allow_changes=true "${@:4}" || [ $? -eq 124 ] || die "$2 failed"
  [ -d "$results/$2/checkpoints" ] || die "MINUTES=$MINUTES is too little for a step of $2"
  steps=$(find "$results/$2/checkpoints" -maxdepth 1 -name '[0-9]*[0-9]' -printf '%f\n' | sort | tail -n 1)
  steps=$((10#$steps * 6 / 5))
  train "$@" run.steps="$steps" optim.decay_fraction=0.1666 run.rewarm=1 run.validate_every="$steps" run.allow_changes=true
}
train_gpt() { # train_gpt SCRIPT NAME: batch_ids counts per process, so divide it to keep the ids of a step
  local ids
  ids=$(sed -n 's/^batch_ids: //p' "configs/$recipe/$2.yaml")
  train "$@" "$processes" batch_ids=$((ids / processes)) run.precision="$precision" run.compile="$compile"
}
pack() { # pack NAME SIZE SOURCE...: render clips once
  local file=$results/data/$1.safetensors
  # shellcheck disable=SC2086 # PACK holds options
  [ -f "$file" ] || "$python" -m tokenizer.data.pack "$file" --size "$2" --sources "${@:3}" ${PACK:-}
}
curate() { # curate NAME [key=value ...]
  echo "mini: $1"
  WORKERS=2 bash scripts/train/2_curate_router_data.sh "configs/$recipe/$1.yaml" "${@:2}"
}
curate_all() {
  if [ "$recipe" = mini ]; then
    curate curate_train
    curate curate_select
    curate curate_heldout
  else
    curate curate_train precision="$precision" "${larger[@]}"
    curate curate_select "${larger[@]}"
  fi
}

if [ "$recipe" != mini ] && stage 0; then
  pack doom_train 72 doom:train:4000 doom:train:6000-10000
  [ -f "$results/data/photo_train.safetensors" ] || [ -d "$results/photos" ] || "$python" scripts/mini/photos.py "$results/photos"
  pack photo_train 72 "photos:$results/photos:5000"
  PACK='' pack doom_validation 64 doom:validation:48
  if stage 5; then
    pack steady_train 72 steady_doom:train:8000
    PACK='' pack steady_validation 64 steady_doom:validation:100
  fi
fi
if stage 1; then train_tokenizer 1_proxy_tokenizer.sh proxy; fi
if stage 2; then curate_all; fi
if stage 3; then train 3_router.sh router 1 "${loaders[@]}"; fi
if stage 4; then train_tokenizer 4_final_tokenizer.sh final; fi

# Half precision for the repository; before stage 5a, whose tokens belong to this file.
if [ "$recipe" != mini ] && stage 4; then "$python" scripts/mini/release.py round --results "$results"; fi

# Release: measure on held-out clips, copy weights, figures and model card into ckpts/mini.
if [ "$recipe" = mini ] && stage 4; then
  "$python" scripts/mini/release.py tokenizer
  "$python" scripts/mini/readme_figure.py
fi
stage 5 || exit 0

extract() { echo "mini: $1" && WORKERS=2 bash scripts/train/5a_extract_codes.sh "configs/$recipe/$1.yaml"; }

for set in extract_c2v extract_c2v_heldout extract_fp extract_fp_heldout; do extract "$set"; done
train_gpt 5b_gpt_c2v.sh gpt_c2v
train_gpt 5b_gpt_frame_pred.sh gpt_fp
[ "$recipe" != mini ] || "$python" scripts/mini/release.py generation
