#!/usr/bin/env bash
# Run the main job with each dependency at the lowest version that pyproject.toml declares, one at a time.
#
#   bash scripts/dev/min_versions.sh [PACKAGE ...]       (default: all but torch and what is built against one torch)
#
# Each version is installed into results/min_versions and put first on the path. Exit 1 if any fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ "${1:-}" = "--help" ] && { sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; }
case ${1:-} in -*) echo "error: unknown option '$1' (see --help)" >&2; exit 2 ;; esac
PY=${PYTHON:-.venv/bin/python}
command -v "$PY" >/dev/null || { echo "error: no Python at $PY: run 'bash scripts/env_install.sh' or set PYTHON" >&2; exit 2; }
out=results/min_versions

floors=$("$PY" - "$@" <<'PYTHON'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
fixed = {"torch", "torchvision", "decord"}
declared = {re.match(r"[\w-]+", line).group() for line in project["dependencies"]}
if unknown := sorted(set(sys.argv[1:]) - declared):
    sys.exit(f"error: no dependency {', '.join(unknown)} in pyproject.toml (see --help)")
for line in project["dependencies"]:
    name, floor = re.match(r"([\w-]+)>=([\w.]+)", line).groups()
    if name in sys.argv[1:] or (not sys.argv[1:] and name not in fixed):
        print(f"{name}=={floor}")
PYTHON
)
numpy=$("$PY" -c 'import re; print(re.search(r"\"numpy>=([\w.]+)\"", open("pyproject.toml").read())[1])')
mkdir -p "$out"
failed=0
for spec in $floors; do
    there=$out/$spec
    case $spec in  # what such a version brings along, by its own requirements
        scipy==* | matplotlib==*) more="numpy==$numpy" ;;
        omegaconf==*) more="antlr4-python3-runtime==4.9.3" ;;
        *) more="" ;;
    esac
    if [ ! -d "$there" ]; then
        # shellcheck disable=SC2086  # `more` may be nothing
        "$PY" -m pip install -q --disable-pip-version-check --no-deps --target "$there" "$spec" $more \
            || { echo "$spec: cannot be installed for this Python"; failed=1; rm -rf "$there"; continue; }
    fi
    if PYTHONPATH=$there:$PWD "$PY" tokenizer/router/reconstruction_qual_with_router.py --overwrite --device cpu \
        --vid_path tokenizer/data/bundled/tree_000.mp4 --save_dir "$out/run" \
        --vq_ckpt ckpts/mini/final.safetensors --router_ckpt ckpts/mini/router.safetensors >"$out/log.txt" 2>&1
    then echo "$spec: works"
    else echo "$spec: $(tail -1 "$out/log.txt")"; failed=1
    fi
done
exit $failed
