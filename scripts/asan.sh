#!/usr/bin/env bash
# The tests of the CUDA kernels with the kernels under AddressSanitizer: an access outside of a
# buffer or of a shared array fails with the line of the kernel. Needs g++ with libasan.
set -euo pipefail
cd "$(dirname "$0")/.."

asan=$(g++ -print-file-name=libasan.so 2>/dev/null || true)
if [ ! -e "$asan" ]; then
    echo "skipped: CUDA kernels under AddressSanitizer (no g++ with libasan)"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tests/emulator/build.sh "$work/libnibble_emulated.so" -fsanitize=address -fno-omit-frame-pointer -O1

# The preload goes to the test binary alone. Rust's leaks and its own stacks are not its business.
host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export "CARGO_TARGET_${host}_RUNNER=env LD_PRELOAD=$asan ASAN_OPTIONS=detect_leaks=0"
NIBBLE_EMULATED=$work/libnibble_emulated.so \
    cargo test --release --workspace --locked --test cuda_kernels -- --skip mutants
