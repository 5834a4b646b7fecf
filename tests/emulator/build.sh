#!/usr/bin/env bash
# Compiles the CUDA kernels for the CPU: tests/emulator/build.sh OUTPUT.so [compiler flags]
# NIBBLE_TRANSLATION is a translation of kernels.ptx (ptx/) to compile in place of kernels.cu.
# NIBBLE_SOURCES is the root of a copy of the sources to compile instead (tests of the tests).
# Needs g++ 9 or newer (CXX picks another compiler) on x86-64 or aarch64 Linux.
set -euo pipefail
output=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
root=${NIBBLE_SOURCES:-$(cd "$here/../.." && pwd)}
kernels=$root/src/kernels/cuda/device
work=$(mktemp -d "$output.XXXXXX") # beside the output: renaming is atomic
trap 'rm -rf "$work"' EXIT

# NIBBLE_ENTRY(largest block, name) for every entry of kernels.cu
tr '\n' ' ' <"$kernels/kernels.cu" |
    grep -o 'extern "C" __global__ void __launch_bounds__([0-9, ]*) *[a-z0-9_]*' |
    sed -E 's/.*__launch_bounds__\(([0-9]*)[0-9, ]*\) *([a-z0-9_]*)/NIBBLE_ENTRY(\1, \2)/' \
        >"$work/entries.inc"

# -ffp-contract=off: products and sums round as written. Locals start as a pattern, not as luck.
flags=(-std=c++17 -O2 -g1 -fPIC -shared -ffp-contract=off -fno-strict-aliasing -pthread
    -Wall -Wno-unknown-pragmas)
if "${CXX:-g++}" -ftrivial-auto-var-init=pattern -x c++ -fsyntax-only /dev/null 2>/dev/null; then
    flags+=(-ftrivial-auto-var-init=pattern)
fi
"${CXX:-g++}" "${flags[@]}" "$@" -I"$work" -I"$here" -I"$kernels" -I"$root/quant/src/cuda" \
    -DNIBBLE_KERNELS="\"${NIBBLE_TRANSLATION:-source.hpp}\"" \
    "$here/emulator.cpp" "$here/driver.cpp" -o "$work/library.so"
mv "$work/library.so" "$output"
