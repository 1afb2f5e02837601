# mhc.c. `make` says what can be made; nothing beyond a C compiler is needed to build and train.

ifeq ($(origin CC), default)
CC := $(shell command -v gcc || command -v clang || echo cc)
endif
PYTHON ?= /usr/bin/python3
DIR ?= out
ARGS ?=

# A flag is used where a program built with it links, never because a package has a name.
works = $(shell printf '$(or $(2),int main(void) { return 0; })' > .probe.c; $(CC) -x c .probe.c $(1) -o .probe -lm 2> /dev/null && echo $(1); rm -f .probe .probe.c)

# MPI: what CC finds by itself, or with what $(MPICC) would add. MPICC=mpicc.mpich chooses one, MPICC= none.
MPICC ?= mpicc
MPI_PROGRAM = \#include <mpi.h>\nint main(void) { return MPI_Init(0, 0); }\n
MPI_FLAGS = $(filter-out -O% -g% -f% -Wall -Wformat% -Werror%,$(wordlist 2,99,$(shell $(MPICC) -show 2> /dev/null)))
FIND_MPI = $(if $(MPICC),$(or $(call works,-DHAVE_MPI,$(MPI_PROGRAM)),$(call works,-DHAVE_MPI $(MPI_FLAGS),$(MPI_PROGRAM))))

ifeq ($(filter clean help,$(or $(MAKECMDGOALS),help)),)
OPENMP := $(or $(call works,-fopenmp),$(call works,-fopenmp-simd))
NATIVE := $(call works,-march=native)
CALM := $(call works,-Wno-pass-failed)
MPI := $(FIND_MPI)
endif

# clang warns of each loop it cannot vectorise as asked; the loop is right all the same.
WARNINGS = -Wall -Wextra -Werror $(CALM)
# No -ffast-math: NaN must stay NaN, and sums are reordered only where a pragma says so.
CFLAGS = -std=c11 -O3 $(NATIVE) -ffp-contract=fast -fno-math-errno -fno-trapping-math $(OPENMP) $(WARNINGS) -D_GNU_SOURCE
GIT_HASH := $(shell git describe --always --dirty 2> /dev/null || echo unknown)
SOURCES = $(wildcard host/*.h data/*.h)

help:
	@sh dev/help.sh "$(CC)" "$(FIND_MPI)"

train_gpt_mhc: train_gpt_mhc.c $(SOURCES) Makefile
	$(CC) $(CFLAGS) -DGIT_HASH='"$(GIT_HASH)"' -pthread $< -o $@ $(MPI) -lm

train train-cpu: train_gpt_mhc
	./train_gpt_mhc --config scripts/tiny.cfg --out $(DIR) --overwrite $(ARGS)

# --- checks. They include the trainer and call parts of it.

HEADER_TESTS = $(patsubst %.c,build/%,$(notdir $(wildcard host/test_*.c data/test_*.c)))
TEST_FLAGS = $(CFLAGS) -pthread -Wno-unused-function
TESTS = build/test_double build/test_float $(HEADER_TESTS)

build:
	mkdir -p build

build/test_float: test_gpt_mhc.c train_gpt_mhc.c $(SOURCES) | build
	$(CC) $(TEST_FLAGS) $< -o $@ -lm

build/test_double: test_gpt_mhc.c train_gpt_mhc.c $(SOURCES) | build
	$(CC) $(TEST_FLAGS) -DREAL=double $< -o $@ -lm

build/test_%: host/test_%.c $(SOURCES) | build
	$(CC) $(TEST_FLAGS) $< -o $@ -lm

build/test_checkpoint: train_gpt_mhc.c

build/test_%: data/test_%.c $(SOURCES) | build
	$(CC) $(CFLAGS) $< -o $@ -lm

TEST_SCRIPTS ?= $(wildcard dev/test_*.sh)
test: train_gpt_mhc $(TESTS)
	PYTHON=$(PYTHON) sh dev/test.sh $(TESTS) $(TEST_SCRIPTS)

deps:
	sh dev/deps.sh

bench: build/bench
	./build/bench $(ARGS)

build/bench: dev/bench.c train_gpt_mhc.c $(SOURCES) | build
	$(CC) $(TEST_FLAGS) $< -o $@ -lm

fuzz:
	sh dev/fuzz.sh $(ARGS)

mutate:
	$(PYTHON) dev/mutate.py $(ARGS)

# In this order: others take their learning rates from lr, and share runs.
FIGURES ?= lr loss gradnorm streams mixing gain depth stress table1 sinkhorn constraints n_gap scaling overhead timeline
figures: train_gpt_mhc
	for name in $(FIGURES); do PYTHON=$(PYTHON) sh scripts/fig_$$name.sh $(ARGS) || exit; done

# --- on a GPU, with nvcc, whose -O is for the host alone; or the same files on the CPU, with
# NVCC=dev/cpu_cuda/nvcc NVCC_OPT=-O1

NVCC ?= nvcc
NVCC_OPT ?= -O2
# Of the GPUs here the oldest; with none, A100's, whose programs newer ones run too.
ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | sort -n | head -n 1 | tr -d . | sed 's/^/sm_/')
PRECISION ?= BF16
ifeq ($(filter BF16 FP32,$(PRECISION)),)
$(error PRECISION: found $(PRECISION), expected BF16 or FP32)
endif
NVCC_FLAGS = -std=c++17 $(NVCC_OPT) -arch=$(or $(ARCH),sm_80) -DPRECISION_$(PRECISION) -DGIT_HASH='"$(GIT_HASH)"' -D_GNU_SOURCE \
             -Xcompiler -Wall,-Wextra,-Wno-unused-function,-fopenmp -Xcompiler -ffp-contract=fast

# Attention by cuDNN: USE_CUDNN=1, and CUDNN_FRONTEND=folder with the headers of cudnn-frontend where they are elsewhere.
CUDNN_FRONTEND ?= $(wildcard build/cudnn_frontend/include)
ifeq ($(USE_CUDNN),1)
ifeq ($(PRECISION),FP32)
$(error USE_CUDNN: found PRECISION=FP32, expected BF16)
endif
CUDNN_HEADERS := $(addprefix -isystem ,$(CUDNN_FRONTEND))
CUDNN := $(shell echo 'int main() { return cudnnGetVersion() == 0; }' > .probe.cc; $(NVCC) -x c++ $(CUDNN_HEADERS) -include cudnn.h -include cudnn_frontend_version.h .probe.cc -o .probe -lcudnn -lnvrtc 2> /dev/null && echo build/attention_cudnn.o -lcudnn -lnvrtc; rm -f .probe .probe.cc)
ifeq ($(CUDNN),)
$(error USE_CUDNN: found no cudnn.h, cudnn_frontend_version.h and -lcudnn that $(NVCC) links, expected cuDNN 9 and cudnn-frontend, run make deps or give CUDNN_FRONTEND=folder)
endif
NVCC_FLAGS += -DUSE_CUDNN
endif

build/attention_cudnn.o: dev/cuda/attention_cudnn.h | build
	$(NVCC) -x c++ -std=c++17 -O2 -Xcompiler -Wall,-Wextra,-Werror -DCUDNN_IMPLEMENTATION $(CUDNN_HEADERS) -c $< -o $@

# NCCL, for ranks with a GPU each; NCCL= leaves it out.
NCCL_PROGRAM = \#include <nccl.h>\nint main() { return ncclGroupStart(); }\n
NCCL = $(shell printf '$(NCCL_PROGRAM)' > .probe.cu; $(NVCC) -std=c++17 .probe.cu -o .probe -lnccl > /dev/null 2>&1 && echo -DHAVE_NCCL -lnccl; rm -f .probe .probe.cu)

GPU_TRAINER ?= train_gpt_mhc_cuda
$(GPU_TRAINER): train_gpt_mhc.cu train_gpt_mhc.c $(SOURCES) Makefile $(filter %.o,$(CUDNN))
	$(NVCC) $(NVCC_FLAGS) $< -o $@ $(filter -D% -I% -L% -l%,$(MPI)) -lcublasLt $(if $(MPI),$(NCCL)) $(CUDNN)

test_gpt_mhc_cuda: test_gpt_mhc.cu train_gpt_mhc.cu train_gpt_mhc.c $(SOURCES) Makefile $(filter %.o,$(CUDNN))
	$(NVCC) $(NVCC_FLAGS) $< -o $@ -lcublasLt $(CUDNN)

train-gpu: train_gpt_mhc_cuda
	./train_gpt_mhc_cuda --config scripts/tiny.cfg --out $(DIR) --overwrite $(ARGS)

test-gpu:
	NVCC=$(NVCC) USE_CUDNN=$(USE_CUDNN) CUDNN_FRONTEND=$(CUDNN_FRONTEND) sh dev/gpu_test.sh

# What CI has no time for: every order of threads, the checks over the whole step, more runs of ranks
test-long:
	LONG=1 $(MAKE) test-gpu
	LONG=1 sh dev/test_pipeline.sh

test-cpu-cuda:
	sh dev/cpu_cuda/test/run.sh

gpu-compile:
	sh dev/gpu_compile.sh

clean:
	rm -rf build train_gpt_mhc train_gpt_mhc_cuda test_gpt_mhc_cuda

.PHONY: help train train-cpu test deps bench fuzz mutate figures train-gpu test-gpu test-long test-cpu-cuda gpu-compile clean
