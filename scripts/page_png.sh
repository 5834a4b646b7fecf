#!/usr/bin/env bash
# A page of Nibble (`nibble memory --html`, report.html) as a browser shows it: docs/memory.png is made
# by it. Needs chromium; loads nothing but the file.
#     scripts/page_png.sh memory.html memory.png [WIDTH HEIGHT] [dark]
set -euo pipefail

page=$(realpath "$1") picture=$(realpath -m "$2") width=${3:-1100} height=${4:-1540}
scheme=${5:-light}
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || {
    echo "error: there is no chromium" >&2
    exit 1
}
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
flags=()
if [ "$scheme" = dark ]; then
    flags+=(--blink-settings=preferredColorScheme=0)
fi
"$browser" --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking \
    --user-data-dir="$profile" --hide-scrollbars "${flags[@]}" --window-size="$width,$height" \
    --screenshot="$picture" "file://$page" 2>"$profile/log" || {
    cat "$profile/log" >&2
    exit 1
}
test -s "$picture"
