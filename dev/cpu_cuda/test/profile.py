#!/usr/bin/env python3
"""The table of CPU_CUDA=profile against lines `// PROFILE kernel: column value, ...` of its source."""
import os
import re
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.realpath(__file__))
SOURCE = os.path.join(HERE, 'test_profile.cu')


# g++ alone keeps a vector that goes through a variable one access. The order of threads must change nothing.
COMPILER = 'g++'
ORDERS = ['forward', 'reverse', 'random:1']


def read_rows(program, order):
    """{kernel: {column: value}} of a run."""
    environment = dict(os.environ, CPU_CUDA='profile,order=' + order)
    result = subprocess.run([program], env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit('status %d\n%s%s' % (result.returncode, result.stdout, result.stderr))
    head, *lines = [line.split() for line in result.stderr.splitlines() if not line.endswith(':')]
    return {line[0]: dict(zip(head, line)) for line in lines}


def main():
    with open(SOURCE) as file:
        expectations = re.findall(r'^// PROFILE (\w+): (.*\S)', file.read(), re.M)
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, 'profile')
        build = [os.path.join(HERE, '..', 'nvcc'), '--check', '-O1', SOURCE, '-o', program]
        subprocess.run(build, check=True, env=dict(os.environ, CXX=COMPILER))
        runs = [(order, read_rows(program, order)) for order in ORDERS]
    passed = failed = 0
    for order, rows in runs:
        for kernel, columns in expectations:
            for column, value in (pair.split() for pair in columns.split(', ')):
                found = rows.get(kernel, {}).get(column)
                passed, failed = passed + (found == value), failed + (found != value)
                if found != value:
                    print('FAIL %s, %s: %s: found %s, expected %s' % (kernel, order, column, found, value))
    print('%d passed, %d failed' % (passed, failed))
    sys.exit(failed > 0 or passed == 0)


main()
