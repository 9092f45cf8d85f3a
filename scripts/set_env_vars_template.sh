# Settings of your machine. Copy this file to scripts/set_env_vars.sh (git ignores it), change what differs, and source the copy from the
# repository: `. scripts/set_env_vars.sh`. Needed before commands that begin with $PYPATH; the scripts of this folder also work without it.

# The folder of this repository.
export PROJECT_ROOT="${PROJECT_ROOT:-$PWD}"

# The interpreter that runs everything: the one that scripts/env_install.sh made, or one of your own with `pip install -e .` done.
export PYPATH="${VENV:-$PROJECT_ROOT/.venv}/bin/python"

# Makes `python -m ...`, as the documentation writes it, this interpreter.
export PATH="$(dirname "$PYPATH"):$PATH"

# Lets `$PYPATH tokenizer/router/...py` find the packages even where the project is not installed.
export PYTHONPATH="$PROJECT_ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Arithmetic of the training stages 1, 3, 4 and 5b (overrides run.precision of the config), and of the GPT where it samples: none (fp32), bf16, fp16.
# export PRECISION=bf16

# UCF-101: the folder of the class folders; the split lists (trainlist01.txt) lie in it, or in ucfTrainTestlist beside it.
# export UCF_ROOT=

# Kinetics-600 for frame prediction: the folder of the videos, and the .csv that lists the validation clips (youtube_id, time_start, ...).
# export K600_ROOT=
# export K600_VAL_FILE=

# The folder of vgg16-397923af.pth, which lpips_vgg needs (default: the cache of torch hub).
# export LPIPS_TRUNK_DIR=
