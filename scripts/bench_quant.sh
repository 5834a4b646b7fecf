#!/usr/bin/env bash
# Speed and memory of quantizing: the blocks beside a plain copy, bitsandbytes' CPU quantizer on the same
# shape, a 7B-shaped checkpoint beside the disk, and a GGUF file with a large vocabulary.
#
#   scripts/bench_quant.sh [--python VENV/bin/python] [--work DIR] [--preset llama-2-7b|1b|tiny]
#
# Needs 18 GB in DIR for the 7B shape, and removes what it wrote there. --python has torch and
# bitsandbytes; without it that part is left out. Writes docs/benchmarks/quantize.{json,md}.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --locked
cargo bench --locked -p nibble-quant --bench blocks --no-run
exec python3 scripts/bench_quant.py "$@"
