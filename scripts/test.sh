#!/usr/bin/env bash
# All tests of both crates, doctests included, in the release profile: the code that users run.
#
#   scripts/test.sh            everything
#   scripts/test.sh nf4        only the tests whose name contains `nf4`
#
# Needs no network. A test that cannot run here prints a line `skipped: ...`; those lines are
# repeated at the end, above one line that sums the run.
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT

started=$SECONDS
status=0
cargo test --release --workspace --locked --no-fail-fast "$@" 2>&1 | tee "$log" || status=$?

echo
grep -o 'skipped: .*' "$log" | sort -u || true
awk -v seconds=$((SECONDS - started)) '
    /^test result:/ { passed += $4; failed += $6; ignored += $8; binaries += 1 }
    END {
        printf "tests: %d passed, %d failed, %d ignored in %d binaries, %d s with the build\n",
            passed, failed, ignored, binaries, seconds
    }' "$log"
exit "$status"
