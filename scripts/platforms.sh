#!/usr/bin/env bash
# Whether the program and its tests compile without a warning on Windows and macOS, and whether tests pass on
# ARM, which qemu emulates.
#
#   scripts/platforms.sh                        both, and the tests of `nibble-quant`, which has ARM's instructions
#   scripts/platforms.sh x86_64-pc-windows-gnu  one
#   scripts/platforms.sh --arm --workspace      tests on ARM: those that the flags of `cargo test` name
#
# Needs rustup, python3 with pip, and the network on the first run: the standard libraries come from rustup,
# and the compiler for the C in a dependency, zig's, from the package registry, 100 MB, kept in the user's
# cache. Tests on ARM need qemu's `qemu-aarch64-static`; those that start the program, that it is registered with
# the kernel (binfmt_misc). What cannot run is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

zig_package=ziglang==0.15.2
tools=${XDG_CACHE_HOME:-$HOME/.cache}/nibble-zig/${zig_package#*==}
arm=aarch64-unknown-linux-musl

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

prepare() { # TARGET
    rustup --quiet target add "$1" || skip "rustup has no $1 to give"
    cargo fetch --quiet --locked --target "$1" || skip "crates for $1 cannot be fetched"
    write_tools "$tools/$1" "$(zig_target "$1")"
    export "CC_${1//-/_}=$tools/$1/cc" "AR_${1//-/_}=$tools/$1/ar"
}

lint() { # TARGET
    prepare "$1"
    cargo clippy --release --workspace --all-targets --locked --target "$1" -- -D warnings
}

# Linked by Rust's own linker into programs that need no library of ARM's. One of the dependencies asks for
# libdl, whose functions are in musl's libc: an empty archive will do.
test_on_arm() { # FLAGS
    local emulator=qemu-aarch64-static
    command -v "$emulator" >/dev/null || skip "no $emulator, which runs tests on ARM"
    prepare "$arm"
    printf '!<arch>\n' >"$tools/$arm/libdl.a"
    local settings=CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL
    env "${settings}_LINKER=rust-lld" "${settings}_RUNNER=$emulator" \
        "${settings}_RUSTFLAGS=-L native=$tools/$arm" \
        cargo test --release --locked --target "$arm" --no-fail-fast "$@"
}

command -v rustup >/dev/null || skip "rustup is not installed"
fetch_zig || skip "zig cannot be fetched from the package registry"
case ${1:-} in
    --arm) test_on_arm "${@:2}" ;;
    '')
        lint x86_64-pc-windows-gnu
        lint aarch64-apple-darwin
        test_on_arm --package nibble-quant
        ;;
    *) for target; do lint "$target"; done ;;
esac
