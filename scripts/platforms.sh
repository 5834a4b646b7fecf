#!/usr/bin/env bash
# Whether the program and its tests compile without a warning where no test of CI runs: Windows and macOS.
#
#   scripts/platforms.sh                        both
#   scripts/platforms.sh x86_64-pc-windows-gnu  one
#
# Needs rustup, python3 with pip, and the network on the first run: the standard libraries come from rustup,
# and the compiler for the C in a dependency, zig's, from the package registry, 100 MB, kept in the user's
# cache. Without them the check is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

zig_package=ziglang==0.15.2
tools=${XDG_CACHE_HOME:-$HOME/.cache}/nibble-zig/${zig_package#*==}
targets=("${@:-}")
[ -n "${targets[0]}" ] || targets=(x86_64-pc-windows-gnu aarch64-apple-darwin)

skip() { # WHY
    echo "skipped: other platforms ($1)"
    exit 0
}

fetch_zig() {
    [ -e "$tools/ziglang" ] && return
    local partial=$tools.$$
    mkdir -p "$partial"
    python3 -m pip install --quiet --no-deps --no-compile --disable-pip-version-check \
        --root-user-action=ignore --target "$partial" "$zig_package" || {
        rm -rf "$partial"
        return 1
    }
    rm -rf "$tools"
    mv "$partial" "$tools"
}

# A C compiler in the manner that the build scripts of dependencies call one: without their names of the
# target, which zig does not know. It stays where it is, as what it compiled is compiled again elsewhere.
write_tools() { # FOLDER ZIG_TARGET
    mkdir -p "$1"
    cat >"$1/cc" <<END
#!/usr/bin/env bash
arguments=()
while [ \$# -gt 0 ]; do
    case \$1 in
        --target=* | -mmacosx-version-min=*) ;;
        -target | -arch) shift ;;
        *) arguments+=("\$1") ;;
    esac
    shift
done
PYTHONPATH='$tools' exec python3 -m ziglang cc -target $2 "\${arguments[@]}"
END
    cat >"$1/ar" <<END
#!/bin/sh
PYTHONPATH='$tools' exec python3 -m ziglang ar "\$@"
END
    chmod +x "$1/cc" "$1/ar"
}

zig_target() { # TARGET
    case $1 in
        x86_64-pc-windows-*) echo x86_64-windows-gnu ;;
        aarch64-apple-darwin) echo aarch64-macos ;;
        *) echo "${1/-unknown/}" ;;
    esac
}

command -v rustup >/dev/null || skip "rustup is not installed"
fetch_zig || skip "zig cannot be fetched from the package registry"
for target in "${targets[@]}"; do
    rustup --quiet target add "$target" || skip "rustup has no $target to give"
    cargo fetch --quiet --locked --target "$target" || skip "crates for $target cannot be fetched"
    write_tools "$tools/$target" "$(zig_target "$target")"
    name=${target//-/_}
    env "CC_$name=$tools/$target/cc" "AR_$name=$tools/$target/ar" \
        cargo clippy --release --workspace --all-targets --locked --target "$target" -- -D warnings
done
