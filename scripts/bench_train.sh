#!/usr/bin/env bash
# Times `nibble train` on two cores and, where a Python with PEFT and bitsandbytes is given, the peer,
# in turns: peak, Nibble, peak, peer, and again. Writes docs/benchmarks/cpu-train.json and .md.
#
#   scripts/bench_train.sh --model DIR [--python VENV/bin/python] [--rounds 3] [--scenarios text-keep,...]
#
# DIR is a dense Hugging Face folder of a Llama-shaped model; docs/benchmarks/README.md says how to
# make SmolLM2's. Needs python3 (standard library only). `--help` lists the other options.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v python3 >/dev/null || { echo "error: python3 is missing" >&2; exit 1; }
cargo build --release --workspace --locked --bin nibble --example fma_peak
target=${CARGO_TARGET_DIR:-target}/release
exec python3 scripts/bench_train.py --nibble "$target/nibble" --peak "$target/examples/fma_peak" "$@"
