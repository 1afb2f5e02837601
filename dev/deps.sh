#!/bin/sh
# Installs what only the checks need: PyTorch for the oracle, clang for the fuzzers, two MPIs for ranks. Debian keeps
# the MPIs apart as mpicc.openmpi, mpicc.mpich and mpirun.*; mpicc is Open MPI then (update-alternatives --config mpi).
set -e
if command -v apt-get > /dev/null; then
    sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
    missing=
    for package in python3-torch clang openmpi-bin libopenmpi-dev mpich libmpich-dev; do
        dpkg -s $package > /dev/null 2>&1 || missing="$missing $package"
    done
    [ -z "$missing" ] && { echo "deps: everything is there"; exit 0; }
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing > /dev/null
    echo "deps: installed$missing"
else
    python3 -m pip install torch numpy
    echo "deps: installed torch; clang (for make fuzz) and MPI are your system's own"
fi
