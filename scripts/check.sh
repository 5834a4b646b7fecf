#!/usr/bin/env bash
# What a change must pass before it lands, and exactly what CI runs: format, lints, documentation
# (a broken link is an error), all tests, the CUDA kernels under AddressSanitizer and their PTX, other
# platforms, the memory of a 1B-shaped model against its plan, and a rehearsal of the check on a GPU.
# Every step uses the release profile and what the tests built, so that the dependencies are built once
# (by `--workspace`: without it, Cargo gives some of them other features).
set -euo pipefail
cd "$(dirname "$0")/.."

step() {
    printf '\n== %s\n' "$*"
    "$@"
}

msrv=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

step cargo fmt --all --check
step cargo clippy --release --workspace --all-targets --locked -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --release --workspace --no-deps --locked
if cargo "+$msrv" --version >/dev/null 2>&1; then
    step cargo "+$msrv" check --release --workspace --locked
else
    printf '\nskipped: Rust %s is not installed; clippy checked the declared minimum\n' "$msrv"
fi
step scripts/test.sh
step scripts/asan.sh
step scripts/ptx.sh --check
step scripts/python.sh
step scripts/platforms.sh
NIBBLE=${CARGO_TARGET_DIR:-target}/release/nibble step scripts/bench_memory.sh --preset 1b --check
step scripts/gpu_check.sh --pack
step scripts/gpu_check.sh --rehearse
