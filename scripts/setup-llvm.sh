#!/usr/bin/env bash
# Installs the LLVM SDK that builds with `--features cuda` link.
#
# Burn's CUDA compiler links a static LLVM. The crate tracel-llvm-bundler downloads one from GitHub while cargo builds,
# so where GitHub can be reached this script is not needed. Everywhere else it puts LLVM 23.1 from the PyPI package
# mlc-llvm-static into the folder where the bundler looks first, and the bundler then downloads nothing.
#
# Usage: scripts/setup-llvm.sh
# Takes about 15 seconds on a fast line and 0.4 GB; does nothing when the SDK is already there.
set -euo pipefail

# The bundler release that Cargo.lock pins, and the PyPI release with the same LLVM. They change together.
bundler_version=23.1.0-4
wheel_version=23.1.1.post0
llvm_series=23.1.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data_home=${XDG_DATA_HOME:-}
# The bundler, too, ignores an XDG_DATA_HOME that is not absolute.
[[ $data_home == /* ]] || data_home=$HOME/.local/share
sdk=$data_home/tracel/tracel-llvm-$bundler_version
sentinel=$sdk/.tracel-llvm-installed

say() { printf 'setup-llvm: %s\n' "$*"; }
die() {
    printf 'setup-llvm: %s\n' "$*" >&2
    exit 1
}

# Prints the LLVM version of the SDK in $1 if its llvm-config runs and knows NVIDIA's target.
sdk_version() {
    "$1/bin/llvm-config" --link-static --libs >/dev/null || return
    [[ " $("$1/bin/llvm-config" --targets-built) " == *" NVPTX "* ]] || return
    "$1/bin/llvm-config" --version
}

locked=$(sed -n '/^name = "tracel-llvm-bundler"$/{n;s/^version = "\(.*\)"$/\1/p;}' "$repository/Cargo.lock")
[[ $locked == "$bundler_version" ]] ||
    die "Cargo.lock pins tracel-llvm-bundler '${locked:-none}', this script serves $bundler_version: update both versions at its head."

# llvm-config is a Python script, so builds need python3 as well.
command -v python3 >/dev/null || "$repository/scripts/install-packages.sh" python3 python3-venv
command -v c++ >/dev/null || command -v g++ >/dev/null || "$repository/scripts/install-packages.sh" g++

if [[ -e $sentinel ]]; then
    version=$(sdk_version "$sdk") ||
        die "the SDK in $sdk is damaged: its llvm-config fails or lacks the NVPTX target. Remove that folder and run this script again."
    say "LLVM $version is already in $sdk"
    exit 0
fi

mkdir -p "$(dirname "$sdk")"
# Beside the SDK, so that the last step is a rename.
staging=$(mktemp -d "$sdk.XXXXXX")
trap 'rm -rf "$staging"' EXIT

if ! python3 -m venv "$staging/venv" >/dev/null 2>&1; then
    rm -rf "$staging/venv"
    "$repository/scripts/install-packages.sh" python3-venv
    python3 -m venv "$staging/venv" || die "python3 -m venv does not work; it needs Python's venv module."
fi

say "downloading LLVM (mlc-llvm-static $wheel_version) from PyPI"
# The extra `all` brings the targets besides the host's, NVPTX among them.
"$staging/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    "mlc-llvm-static[all]==$wheel_version" ||
    die "pip could not install mlc-llvm-static $wheel_version: is PyPI reachable, python3 at least 3.10, and the machine x86-64 or 64-bit Arm?"
unpacked=$("$staging/venv/bin/python" -m mlc_llvm_static.config --prefix)

chmod +x "$unpacked/bin/llvm-config"
version=$(sdk_version "$unpacked") || die "the installed llvm-config fails or lacks the NVPTX target."
[[ $version == "$llvm_series"* ]] || die "expected LLVM ${llvm_series}x, the package holds $version."

# What stands there without the sentinel is an installation that was interrupted.
rm -rf "$sdk"
mv "$unpacked" "$sdk"
touch "$sentinel"
say "LLVM $version is in $sdk"
