#!/bin/sh
# The transport between processes, under each MPI that is installed: known bytes, and what becomes of the
# others when a rank ends or stands still.
. dev/testlib.sh
cc=${CC:-cc}
flags="-std=c11 -O1 -Wall -Wextra -Werror -Wno-unused-function -pthread -D_GNU_SOURCE"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# ranks P PROGRAM ARGUMENT...: leaves its $status, and what it said
ranks() {
    P=$1
    shift
    start=$(date +%s)
    timeout 60 $mpirun -np "$P" "$@" > "$work/said" 2>&1
    status=$?
}

# verdict WHAT COMMAND...: passes if the command does
verdict() {
    what="$mpicc: $1"
    shift
    if "$@"; then pass "$what, status $status"
    else fail "$what" "status $status, $(head -c 600 "$work/said")"
    fi
}

# right P ARGUMENT...: all ranks see known bytes.
all_right() { [ $status = 0 ] && grep -q "^0 wrong on $P ranks of MPI" "$work/said"; }
right() {
    ranks "$1" "$work/ranks" $2
    verdict "$1 ranks, $2" all_right
}

# ends HOW WORDS: of 3 ranks the last one does HOW. All end within 5 s and say why, and mpirun fails.
alive() { for pid in $(cat "$work/pids"); do kill -0 "$pid" 2> /dev/null && return 0; done; return 1; }
said() { [ ! "$1" ] || grep -q "$1" "$work/said"; }
all_ended() { [ $status != 0 ] && [ "$(wc -l < "$work/pids")" = 3 ] && ! alive && said "$1"; }
ends() {
    : > "$work/pids"
    ranks 3 "$work/ranks" "$1" "$work/pids"
    since=$(date +%s)           # mpirun itself may be slow to start
    while alive && [ $(($(date +%s) - since)) -lt 5 ]; do sleep 0.05; done
    verdict "a rank does $1, all end" all_ended "$2"
}

# refused PROGRAM WORDS: each of 2 processes would train alone.
one_line() { [ $status = 2 ] && [ "$(grep -c "found 2 ranks, expected 1 of $1" "$work/said")" = 1 ]; }
refused() {
    ranks 2 "$1" exercise
    verdict "$2 is refused in one line" one_line "$2"
}

under_mpi() {
    $mpirun --version | grep -qE 'Open ?(MPI|RTE)' && mpirun="$mpirun --oversubscribe --bind-to none"
    status=0
    verdict "compiles" $mpicc $flags -DHAVE_MPI host/test_transport.c -o "$work/ranks" -lm
    right 1 exercise
    right 2 exercise
    right 5 exercise
    right 3 blocks
    right 2 "broadcast 67108864"
    ends kill ''
    ends exit ''
    ends stop 'rank 0: no progress for 0.5 s: waiting for rank 2 in a sum'
    ends sleep 'rank 0: no progress for 0.5 s: waiting for rank 2 in a sum'
    refused "$work/alone" "one process"
    [ -x "$work/other" ] && refused "$work/other" "MPI"
    mv "$work/ranks" "$work/other"
}

check "a program without MPI" $cc $flags host/test_transport.c -o "$work/alone" -lm
for mpi in .openmpi .mpich ""; do
    mpicc=mpicc$mpi mpirun=mpirun$mpi
    command -v $mpicc > /dev/null && command -v $mpirun > /dev/null || continue
    [ "$mpi" = "" ] && [ -x "$work/other" ] && continue     # one of those before
    under_mpi
done
[ -x "$work/other" ] || skip "ranks of MPI" "no mpicc and mpirun here; make deps installs them"
finish
