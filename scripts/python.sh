#!/usr/bin/env bash
# Looks for undefined names and unused imports in the Python scripts, many of which run where CI does not:
# on a GPU, or beside PyTorch. Needs python3 with pip, and the network on the first run: pyflakes comes from
# the package registry, 64 kB, kept in the user's cache. Without it the check is skipped, unless CI is set.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VERSION=3.4.0
folder=${XDG_CACHE_HOME:-$HOME/.cache}/nibble-pyflakes
wheel=$folder/pyflakes-$VERSION-py2.py3-none-any.whl

if [ ! -f "$wheel" ]; then
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
        "pyflakes==$VERSION" || {
        [ -z "${CI:-}" ] || exit 1
        echo "skipped: pyflakes $VERSION is not at hand"
        exit 0
    }
fi
PYTHONPATH=$wheel python3 -m pyflakes scripts tests
