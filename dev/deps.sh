#!/bin/sh
# Installs what only checks and figures need: PyTorch for the oracle, clang for the fuzzers, matplotlib, two MPIs
# for ranks. Debian keeps the MPIs apart as mpicc.openmpi, mpicc.mpich and mpirun.*; mpicc is Open MPI then
# (update-alternatives --config mpi).
set -e
if command -v apt-get > /dev/null; then
    sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
    missing=
    for package in python3-torch python3-matplotlib clang openmpi-bin libopenmpi-dev mpich libmpich-dev; do
        dpkg -s $package > /dev/null 2>&1 || missing="$missing $package"
    done
    if [ -n "$missing" ]; then
        $sudo apt-get update -qq
        DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing > /dev/null
    fi
    echo "deps: installed${missing:- nothing, everything is there}"
else
    python3 -m pip install torch numpy matplotlib
    echo "deps: installed torch, matplotlib; clang (for make fuzz) and MPI are your system's own"
fi
# Where cuDNN is, the headers that USE_CUDNN=1 needs beside it
frontend=build/cudnn_frontend
if [ ! -e $frontend ] && command -v nvcc > /dev/null && echo '#include <cudnn.h>' | nvcc -x c++ -E - > /dev/null 2>&1; then
    if python3 -m pip install -q --no-deps --target $frontend nvidia-cudnn-frontend==1.32.0; then
        echo "deps: installed cudnn-frontend in $frontend"
    else
        rm -rf $frontend
        echo "deps: cudnn-frontend could not be installed; USE_CUDNN=1 stays unchecked"
    fi
fi
