#!/usr/bin/env bash
# Predicted and measured memory of training a model of random weights: 4-bit blocks in memory, and
# streamed from their file.
#
#   scripts/bench_memory.sh [--preset llama-2-7b|1b|tiny] [--work DIR] [--max-length 512] [--steps 1] [--check]
#
# Needs 18 GB in DIR for the 7B shape (3 GB for 1b), and removes what it wrote there. Writes
# docs/benchmarks/memory-PRESET.{json,md}; --check writes nothing and fails where a goal is missed.
# NIBBLE names a program that is built already.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${NIBBLE:-}" ]; then
    cargo build --release --locked --bin nibble
    NIBBLE=${CARGO_TARGET_DIR:-target}/release/nibble
fi
exec python3 scripts/bench_memory.py --nibble "$NIBBLE" "$@"
