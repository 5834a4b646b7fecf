#!/usr/bin/env bash
# One call on a bare GPU machine (Python with torch, no Rust) that decides every goal on it: speed and
# memory of 8B- and 32B-shaped random models, PEFT + bitsandbytes beside them, losses and gradients beside
# the CPU's, tests on the card.
#
#   scripts/gpu_check.sh --pack        where there is Rust: builds and collects into gpu_check/, with a sum of
#                                      the sources, which must be those of the folder that is checked
#   scripts/gpu_check.sh --pack-peer   adds bitsandbytes for a machine that lacks it, for CUDA 13's PyTorch
#   scripts/gpu_check.sh               on the GPU machine, in a copy of this folder with gpu_check/
#   scripts/gpu_check.sh --only STAGE,...  these stages alone, with what they need, after a mend
#   scripts/gpu_check.sh --rehearse    the check itself where there is no card: no GPU result
#
# After every stage it writes $OUT/gpu_check.{json,md}, without OUT docs/benchmarks/gpu-CARD.{json,md}; it
# prints the table last, between two lines that sum it up. Status: 0 all goals are met, 1 one is missed,
# 2 wrong usage, 4 one is not measured, 3 there is no card, or nothing to run. Ends within 475 s.
set -euo pipefail
cd "$(dirname "$0")/.."
carried=gpu_check
binaries=(nibble cuda_backend cuda_kernels)

# A sum of what the binaries are made of, where there is no git, too.
sources() {
    find src quant tests Cargo.toml Cargo.lock -type f -not -name '*.rs.bk' \
        -not -path '*/target/*' -not -path '*/__pycache__/*' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d ' ' -f 1
}

# With a + where the sources are not those of the commit.
commit() {
    local head changed
    head=$(git rev-parse --short HEAD) || head=unknown
    changed=$(git status --porcelain -- src quant tests Cargo.toml Cargo.lock) || true
    echo "$head${changed:++}"
}

pack() {
    local packed of
    packed=$(sources)
    of=$(commit)
    mkdir -p "$carried"
    rm -f "$carried/sources"
    # Builds the program, too.
    cargo test --release --workspace --locked --no-run --test cuda_backend --test cuda_kernels \
        --message-format=json |
        python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and "test" in message["target"]["kind"]:
        print(message["target"]["name"], message["executable"])' |
        while read -r name binary; do cp "$binary" "$carried/$name"; done
    cp "${CARGO_TARGET_DIR:-target}/release/nibble" "$carried/nibble"
    # Names of functions are two thirds of it, and a half of the rest repeats itself.
    strip "${binaries[@]/#/$carried/}"
    gzip --force "${binaries[@]/#/$carried/}"
    # Tests find their data under the folder that they were compiled in.
    pwd >"$carried/root"
    if [ "$packed" != "$(sources)" ]; then
        echo "error: sources changed while they were built" >&2
        return 1
    fi
    echo "$packed $of" >"$carried/sources"
    echo "packed: $of, $(du -sh "$carried" | cut -f1) in $carried/"
}

# Of the wheel's libraries, one for each version of CUDA, those that are used.
pack_peer() {
    local wheels
    wheels=$(mktemp -d)
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --platform manylinux_2_24_x86_64 --dest "$wheels" bitsandbytes==0.50.2
    rm -rf "$carried/site"
    python3 - "$wheels"/*.whl "$carried/site" <<'PYTHON'
import sys, zipfile
wheel, site = sys.argv[1:]
kept = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
with zipfile.ZipFile(wheel) as file:
    names = [n for n in file.namelist() if n.endswith((".py", *kept)) or ".dist-info/" in n]
    file.extractall(site, names)
PYTHON
    rm -r "$wheels"
    echo "packed: $(du -sh "$carried/site" | cut -f1) in $carried/site/"
}

# The driver and cuBLAS of a rehearsal: the library that the tests run on.
emulate() {
    local library folder
    library=$("$carried/cuda_backend" --exact --nocapture emulated::is_compiled |
        sed -n 's/.*EMULATED //p')
    [ -n "$library" ] || return 0
    folder=$(dirname "$library")/gpu_check
    mkdir -p "$folder"
    ln -sf "$library" "$folder/libcuda.so.1"
    ln -sf "$library" "$folder/libcublas.so.12"
    export LD_LIBRARY_PATH=$folder NIBBLE_CUDA_LIB_DIR=$folder
}

only=
case $#:${1:-} in
2:--only) only=${2:?} ;;
0: | 1:--pack | 1:--pack-peer | 1:--rehearse) ;;
*) set -- --help ;;
esac
case ${1:-} in
--pack)
    pack
    exit
    ;;
--pack-peer)
    pack_peer
    exit
    ;;
--rehearse) mode=rehearse ;;
"" | --only) mode=check ;;
*) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
esac

require() { # FILE HOW
    [ -e "$carried/$1" ] && return
    echo "GPU CHECK DID NOT RUN: $carried/$1 is missing; make it with scripts/gpu_check.sh $2"
    exit 3
}

require sources --pack
read -r packed commit <"$carried/sources"
if [ "$packed" != "$(sources)" ]; then
    echo "GPU CHECK DID NOT RUN: $carried/ was packed from other sources than these, at commit $commit;" \
        "pack it anew with scripts/gpu_check.sh --pack"
    exit 3
fi
for binary in "${binaries[@]}"; do
    require "$binary.gz" --pack
    gunzip --stdout "$carried/$binary.gz" >"$carried/$binary.partial"
    chmod +x "$carried/$binary.partial"
    mv "$carried/$binary.partial" "$carried/$binary"
done
require root --pack
is_installed='import importlib.util, sys; sys.exit(importlib.util.find_spec("bitsandbytes") is None)'
if [ "$mode" = check ] && [ ! -e "$carried/site/bitsandbytes" ] && ! python3 -c "$is_installed"; then
    echo "warning: there is no bitsandbytes, so that nothing is measured beside the peer;" \
        "scripts/gpu_check.sh --pack-peer carries it"
fi
root=$(cat "$carried/root")
if [ ! -e "$root" ]; then
    mkdir -p "$(dirname "$root")"
    ln -sfn "$PWD" "$root"
fi
if [ "$mode" = rehearse ]; then
    emulate
    # What is carried are the packed ones.
    trap 'rm -f "${binaries[@]/#/$carried/}"' EXIT
    timeout -k 5 475 python3 scripts/gpu_check.py rehearse
    exit
fi
exec timeout -k 5 475 python3 scripts/gpu_check.py check ${only:+"$only"}
