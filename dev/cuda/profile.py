#!/usr/bin/env python3
"""What the kernels of the lab move, against what they must: profile.py PROGRAM..., built by dev/cpu_cuda/nvcc --check.

A program says `floor KERNEL DATA ONCE`: the bytes of global memory that its launch cannot do without, of data and of what is
read once whatever the number of rows. Distinct bytes stand for the traffic of memory, bytes asked for that of the L2 cache.
LIMITS holds what is promised: bytes over the floor, sectors asked over fewest, passes of shared memory over fewest.
"""
import os
import re
import subprocess
import sys

LIMITS = {  # kernel: bytes, sectors, passes. Beyond the floor are coefficients: some 200 numbers a token beside 5 C or more.
    'write_project': (1.05, 1.01, 1.0),
    'write_fused_kernel': (1.05, 1.01, 1.0),
    'read_layernorm_fused_kernel': (1.05, 1.0, 1.0),
    'sinkhorn_forward_kernel': (1.0, 1.0, 1.0),
    'sinkhorn_backward_kernel': (1.0, 1.05, 1.0),
    'read_backward_fused_kernel': (1.05, 1.0, 1.0),
    'state_backward': (1.04, 1.0, 1.0),
    'add_parts_kernel': (1.01, 1.0, 1.0),
}


def rows_of(table):
    """{kernel: {column: (asked, least) or number}} of CPU_CUDA=profile's table."""
    head = None
    for line in table.splitlines():
        if line.startswith('kernel '):
            head = line.split()[1:]
        elif head:
            name, *values = re.sub(r'<.*?>', '', line).split()
            yield name, {column: [int(n) for n in value.split('/')] for column, value in zip(head, values)}


def main():
    passed = failed = 0
    print('%-28s %9s %10s %9s %9s %9s' % ('kernel', 'floor, KB', 'of floor', 'L2', 'sectors', 'passes'))
    for program in sys.argv[1:]:
        run = subprocess.run([program, 'profile'], env=dict(os.environ, CPU_CUDA='profile'), capture_output=True, text=True)
        if run.returncode:
            sys.exit('%s: status %d\n%s' % (program, run.returncode, run.stderr[-2000:]))
        rows = dict(rows_of(run.stderr))
        for kernel, data, once in re.findall(r'^floor (\w+) (\d+) (\d+)', run.stdout, re.M):
            row, data, once = rows[kernel], int(data), int(once)
            asked, distinct = (row['read'][i] + row['written'][i] for i in range(2))
            ratios = ((distinct - once) / data, row['sectors'][0] / row['sectors'][1],
                      row['passes'][0] / row['passes'][1] if row['passes'][1] else 1.0)
            print('%-28s %9.1f %10.3f %9.3f %9.3f %9.3f' % (kernel, data / 1e3, ratios[0], asked / data, *ratios[1:]))
            for what, ratio, limit in zip(('bytes', 'sectors', 'passes'), ratios, LIMITS.get(kernel, ())):
                passed, failed = passed + (ratio <= limit), failed + (not ratio <= limit)
                if not ratio <= limit:
                    print('FAIL %s: %s: found %.3f of the least, expected at most %.2f' % (kernel, what, ratio, limit))
    print('%d passed, %d failed' % (passed, failed))
    sys.exit(failed > 0 or passed == 0)


main()
