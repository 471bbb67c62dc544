#!/usr/bin/env bash
# Builds `ttt` for CUDA and packs it into .carry/ttt.xz, to be taken to a GPU machine that has no Rust toolchain.
# There: `xz -dc .carry/ttt.xz > ttt && chmod +x ttt && . scripts/gpu-env.sh && ./ttt doctor`.
#
# Usage: scripts/gpu-bundle.sh [CARGO_BUILD_ARGUMENT...]
# The GPU machine needs a C library at least as new as this machine's, a driver, and NVIDIA's libraries.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup-llvm.sh
command -v xz >/dev/null || scripts/install-packages.sh xz-utils
command -v strip >/dev/null || scripts/install-packages.sh binutils

cargo build --release --workspace --features cuda --bin ttt "$@"
target=$(cargo metadata --no-deps --format-version 1 | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
built=$target/release/ttt

mkdir -p .carry
stripped=.carry/ttt
packed=.carry/ttt.xz
trap 'rm -f "$stripped" "$packed.part"' EXIT
strip -o "$stripped" "$built"
xz -T2 -6 --stdout "$stripped" >"$packed.part"
mv "$packed.part" "$packed"

mib() { du --bytes "$1" | awk '{ printf "%.1f MiB", $1 / 1048576 }'; }
printf 'gpu-bundle: %s built, %s stripped, %s in %s\n' \
    "$(mib "$built")" "$(mib "$stripped")" "$(mib "$packed")" "$packed"
