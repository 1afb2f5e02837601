#!/bin/sh
# A pipeline of ranks on this machine: sh scripts/run_pipeline_mpirun.sh RANKS [OPTION]...
#     sh scripts/run_pipeline_mpirun.sh 4 --model d12 --pipeline dualpipev --micro-batches 16 --recompute auto
# Each rank gets its share of the cores. TRAINER names another program, as ./train_gpt_mhc_cuda.
set -eu
case ${1:-} in ''|*[!0-9]*|0) echo "run_pipeline_mpirun.sh: found ${1:-nothing}, expected the number of ranks, then options" >&2; exit 2 ;; esac
ranks=$1
shift
cd "$(dirname "$0")/.."
trainer=${TRAINER:-./train_gpt_mhc}
if ! command -v mpirun > /dev/null; then
    echo "run_pipeline_mpirun.sh: found no mpirun, expected Open MPI or MPICH; without one try --pipeline ... --ranks $ranks in one process" >&2
    exit 2
fi
[ "$trainer" != ./train_gpt_mhc ] || make -s train_gpt_mhc
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
# Bound to a core, as Open MPI does by default, a rank has one thread. After SIGTERM to mpirun the ranks save: it must wait.
if mpirun --version | grep -qE 'Open ?(MPI|RTE)'; then
    set -- --oversubscribe --bind-to none --mca odls_base_sigkill_timeout "${SAVE_SECONDS:-120}" -np "$ranks" "$trainer" "$@"
else
    set -- -np "$ranks" "$trainer" "$@"
fi
exec mpirun "$@"
