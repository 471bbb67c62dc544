#!/usr/bin/env bash
# Installs Debian packages where that needs no questions (root, apt-get), and elsewhere says what to install.
#
# Usage: scripts/install-packages.sh PACKAGE...
set -euo pipefail

if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "missing: $*. Install these (Debian's names: sudo apt-get install $*) and run this again." >&2
    exit 1
fi
echo "installing Debian packages: $*"
export DEBIAN_FRONTEND=noninteractive
apt-get install -y -qq "$@" >/dev/null 2>&1 && exit
# A fresh machine has no package lists yet.
apt-get update -qq
apt-get install -y -qq "$@" >/dev/null
