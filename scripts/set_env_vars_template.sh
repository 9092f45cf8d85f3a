# Settings of your machine. Copy this file to scripts/set_env_vars.sh (git ignores it), change what differs, and source the copy from the
# repository: `. scripts/set_env_vars.sh`. Needed before commands that begin with $PYPATH; the scripts of this folder also work without it.

# The folder of this repository.
export PROJECT_ROOT="${PROJECT_ROOT:-$PWD}"

# The interpreter that runs everything: the one that scripts/env_install.sh made, or one of your own with `pip install -e .` done.
export PYPATH="$PROJECT_ROOT/.venv/bin/python"

# Lets `$PYPATH tokenizer/router/...py` find the packages even where the project is not installed.
export PYTHONPATH="$PROJECT_ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Arithmetic of the training scripts: none (fp32), bf16 or fp16. Overrides run.precision of the config.
# export PRECISION=bf16

# Kinetics-600 for frame prediction: the folder of the videos, and the .csv that lists the validation clips (youtube_id, time_start, ...).
# export K600_ROOT=
# export K600_VAL_FILE=
