#!/usr/bin/env bash
# Create a virtual environment and install this project into it. Exits at once if it is up to date.
#
#   bash scripts/env_install.sh
#
# PYTHON=...  interpreter for the environment, 3.11 or newer (default: python3, else python3.11)
# VENV=...    folder of the environment (default: .venv in the repository)

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
no_arguments "$@"
cd "$ROOT"

# The stamp records what was installed: the repository's path and its pyproject.toml.
stamp=$VENV/evatok-installed
wanted() { echo "$ROOT" && cat pyproject.toml; }
if wanted | cmp -s - "$stamp" && [ -x "$VENV/bin/python" ]; then exit 0; fi

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  for python in ${PYTHON:-python3 python3.11}; do new_enough "$python" && break; done
  new_enough "$python" || die "no Python 3.11 or newer as '${PYTHON:-python3 or python3.11}': set PYTHON to one"
  echo "Creating $VENV"
  "$python" -m venv "$VENV" || die "'$python -m venv $VENV' failed (on Debian and Ubuntu: apt-get install python3-venv)"
fi
new_enough "$VENV/bin/python" || die "$VENV holds a Python older than 3.11: remove that folder or set VENV to another"

echo "Installing evatok and its packages into $VENV (once; about 2 minutes and 6 GB)"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[offline,scenes,semantic,log,demo,dev]" ||
  die "pip could not install the packages into $VENV; see its message above"
wanted >"$stamp"
