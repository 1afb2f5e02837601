#!/bin/sh
# Installs what only the checks need: PyTorch for the oracle, clang for the fuzzers.
set -e
if command -v apt-get > /dev/null; then
    sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
    missing=
    for package in python3-torch clang; do dpkg -s $package > /dev/null 2>&1 || missing="$missing $package"; done
    [ -z "$missing" ] && { echo "deps: everything is there"; exit 0; }
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing > /dev/null
    echo "deps: installed$missing"
else
    python3 -m pip install torch numpy
    echo "deps: installed torch; clang (for make fuzz) is your system's own"
fi
