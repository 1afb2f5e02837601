#!/bin/sh
# What `make` alone prints: the targets, and what was found on this machine. $1 is the compiler, $2 its flags for MPI.
cc=$1 mpi=$2
yes_no() { if eval "$2" > /dev/null 2>&1; then printf '  yes  %s\n' "$1"; else printf '  no   %s\n' "$1: $3"; fi; }
probe=$(mktemp -d) && trap 'rm -rf "$probe"' EXIT
printf 'int main(void) { return 0; }\n' > "$probe/a.c"

cat <<'TEXT'
mhc.c trains GPT models with manifold-constrained hyper-connections.

  make train       build, then train a small model on the built-in corpus (DIR=out, ARGS="--steps 100 ...")
  make test        every check that fits in minutes; make deps installs what only checks need
  make bench       tokens/s, GFLOP/s, and the cost of each residual mode against plain
  make fuzz        throw damaged files at every parser (ARGS=seconds)
  make mutate      plant mistakes in the mathematics and the kernels and see the checks find them
  make figures     the paper's figures, small; FIGURES="gain loss": some; sh scripts/fig_gain.sh --help
  make test-cpu-cuda   CUDA source run on the CPU: the checks of dev/cpu_cuda
  make gpu-compile     every .cu with nvcc, for each architecture (no GPU needed)
  make clean

  ./train_gpt_mhc --help lists every option.

found here:
TEXT
yes_no "compiler: $cc" "command -v $cc" "install gcc or clang"
yes_no "OpenMP (several threads)" "$cc -fopenmp $probe/a.c -o $probe/a" "training runs on one thread"
yes_no "MPI (ranks in several processes)" '[ "$mpi" ]' "one rank; make deps, or an Open MPI or MPICH of yours (MPICC=mpicc)"
yes_no "clang with libFuzzer (make fuzz)" "printf 'int LLVMFuzzerTestOneInput(void) { return 0; }' > $probe/f.c && clang -fsanitize=fuzzer $probe/f.c -o $probe/f" "install clang"
yes_no "nvcc (make gpu-compile)" "command -v ${NVCC:-nvcc}" "install the CUDA toolkit"
yes_no "matplotlib (make figures)" "${PYTHON:-/usr/bin/python3} -c 'import matplotlib'" "make deps"
yes_no "PyTorch (the oracle in make test)" "${PYTHON:-/usr/bin/python3} -c 'import torch'" "make deps; until then those checks are skipped"
