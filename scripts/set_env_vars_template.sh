# Settings of your machine. Copy this file to scripts/set_env_vars.sh (git ignores it), edit the copy, and source it from the repository:
# `. scripts/set_env_vars.sh`. Commands that start with $PYPATH need it; the scripts in this folder work without it.

# The folder of this repository.
export PROJECT_ROOT="${PROJECT_ROOT:-$PWD}"

# The interpreter: that of scripts/env_install.sh, or your own after `pip install -e .`.
export PYPATH="${VENV:-$PROJECT_ROOT/.venv}/bin/python"

# `python` in the documentation means this interpreter.
export PATH="$(dirname "$PYPATH"):$PATH"

# `$PYPATH tokenizer/router/...py` finds the packages even if the project is not installed.
export PYTHONPATH="$PROJECT_ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Precision of all stages (overrides the config) and of GPT sampling: none (fp32), bf16, fp16.
# export PRECISION=bf16

# UCF-101: the folder of the class folders, with the split lists (trainlist01.txt) in it or in ucfTrainTestlist beside it.
# export UCF_ROOT=

# Kinetics-600 for frame prediction: the video folder, and the .csv of the validation clips (youtube_id, time_start, ...).
# export K600_ROOT=
# export K600_VAL_FILE=

# The folder of vgg16-397923af.pth for lpips_vgg (default: the torch hub cache).
# export LPIPS_TRUNK_DIR=
