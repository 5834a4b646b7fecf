#!/usr/bin/env bash
# One call on a bare GPU machine (Python with torch and CUDA libraries, no Rust): tests on the card,
# memory, step times of an 8B-shaped random model beside PEFT + bitsandbytes where they import.
#
#   scripts/gpu_check.sh --pack       where there is Rust: builds and collects into gpu_check/
#   scripts/gpu_check.sh              on the GPU machine, in a copy of this folder with gpu_check/
#   scripts/gpu_check.sh --rehearse   the script itself on the CPU with a tiny model: no GPU result
#
# Writes docs/benchmarks/gpu-CARD.{json,md} and prints the table last, under one line that says
# PASSED or FAILED. Without a usable GPU it writes nothing, says so and ends with status 3. Safe to
# run again; ends within 8 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
carried=gpu_check

pack() {
    mkdir -p "$carried"
    cargo build --release --locked
    local target=${CARGO_TARGET_DIR:-target}
    cp "$target/release/nibble" "$carried/nibble"
    cargo test --release --locked --no-run --test cuda_backend --test cuda_kernels \
        --message-format=json |
        python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and "test" in message["target"]["kind"]:
        print(message["target"]["name"], message["executable"])' |
        while read -r name binary; do cp "$binary" "$carried/$name"; done
    # Names of functions are two thirds of it; a carried folder has its limits.
    strip "$carried"/{nibble,cuda_backend,cuda_kernels}
    # Tests find their data under the folder that they were compiled in.
    pwd >"$carried/root"
    echo "packed: $(du -sh "$carried" | cut -f1) in $carried/"
}

case ${1:-} in
--pack) pack && exit ;;
--rehearse) mode=rehearse ;;
"") mode=check ;;
*) sed -n '2,12p' "$0" && exit 2 ;;
esac

for file in nibble cuda_backend cuda_kernels root; do
    [ -e "$carried/$file" ] || {
        echo "GPU CHECK DID NOT RUN: $carried/$file is missing; make it with scripts/gpu_check.sh --pack"
        exit 3
    }
done
if [ "$mode" = check ]; then
    obstacle=$("$carried/nibble" doctor --json | python3 -c 'import json, sys
print(json.load(sys.stdin)["cuda"]["obstacle"] or "")')
    [ -z "$obstacle" ] || {
        echo "GPU CHECK DID NOT RUN: $obstacle"
        exit 3
    }
fi
root=$(cat "$carried/root")
if [ ! -e "$root" ]; then
    mkdir -p "$(dirname "$root")"
    ln -s "$PWD" "$root"
fi
exec timeout 470 python3 scripts/gpu_check.py "$mode"
