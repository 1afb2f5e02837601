#!/usr/bin/env python3
"""Runs programs of planted mistakes and sees each one reported, with its lines: mistakes.py [--only CASE] file.cu...

In the source:
    // CASE name modes: text      text must be in the report of every mode (comma list of MODES), or `clean`: no report at all
    // HERE name                  at the end of a line that the report must name as file.cu:LINE
"""
import os
import re
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.realpath(__file__))
NVCC = os.path.join(HERE, '..', 'nvcc')
CASE = re.compile(r'//\s*CASE (\w+) ([\w,]+): (.*\S)')
MARK = re.compile(r'//\s*HERE ((?:\w+\s*)+)$')
# mode: how it is built, and the CPU_CUDA settings it runs under; with several, one of them must show the mistake.
MODES = {
    'plain': ([], ['']),
    'check': (['--check'], ['']),
    'address': (['--address'], ['']),
    'lazy': ([], ['lazy']),
    'order': ([], ['order=reverse', 'order=random:1', 'order=random:2']),
}
TIMEOUT = 60


def read_cases(source):
    """([(name, [mode], text)], {name: [line]})"""
    cases, lines = [], {}
    with open(source) as file:
        for number, line in enumerate(file, 1):
            case, mark = CASE.search(line), MARK.search(line)
            if case:
                cases.append((case.group(1), case.group(2).split(','), case.group(3)))
            for name in mark.group(1).split() if mark else []:
                lines.setdefault(name, []).append(number)
    unknown = set(lines) - {name for name, _, _ in cases}
    if unknown:
        sys.exit('%s: HERE names no case: %s' % (source, ' '.join(sorted(unknown))))
    return cases, lines


def build(source, mode, folder):
    program = os.path.join(folder, '%s-%s' % (os.path.basename(source), mode))
    # planted mistakes are undefined behaviour: the compiler is kept from acting on it
    subprocess.run([NVCC, *MODES[mode][0], '-O1', '-fno-strict-aliasing', '-fwrapv' if mode != 'address' else '-O0',
                    source, '-o', program], check=True)
    return program


def attempt(program, name, setting):
    """(exit status, stderr) of one run."""
    words = [word for word in (os.environ.get('CPU_CUDA', ''), setting) if word]
    environment = dict(os.environ, CPU_CUDA=','.join(words), ASAN_OPTIONS='detect_leaks=0')
    try:
        result = subprocess.run([program, name], env=environment, timeout=TIMEOUT,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        return 'no end in %d s' % TIMEOUT, ''
    return result.returncode, result.stderr.decode(errors='replace')


def fault_of(status, report, text, source, lines):
    """Why this run is not what the case states, or None."""
    if text == 'clean':
        return None if status == 0 and not report else 'expected no report'
    if not isinstance(status, int) or status == 0:
        return 'exit status %s, expected a failure' % status
    if text not in report:
        return 'the report lacks: ' + text
    missing = [line for line in lines if not re.search(r'%s:%d\b' % (re.escape(os.path.basename(source)), line), report)]
    return 'the report lacks line %s' % ', '.join(map(str, missing)) if missing else None


def main():
    only = sys.argv[sys.argv.index('--only') + 1] if '--only' in sys.argv else None
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in (word for word in sys.argv[1:] if word.endswith('.cu')):
            cases, lines = read_cases(source)
            programs = {}
            for name, mode, text in ((n, m, t) for n, modes, t in cases for m in modes if only in (None, n)):
                if mode not in programs:
                    programs[mode] = build(source, mode, folder)
                runs = [attempt(programs[mode], name, setting) for setting in MODES[mode][1]]
                faults = [fault_of(*run, text, source, lines.get(name, [])) for run in runs]
                good = (any if text != 'clean' else all)(fault is None for fault in faults)
                passed, failed = passed + good, failed + (not good)
                if not good:
                    print('FAIL %s %s (%s): %s\n%s' % (os.path.basename(source), name, mode, faults[0], runs[0][1][:1500]))
    print('%d passed, %d failed' % (passed, failed))
    sys.exit(failed > 0 or passed == 0)


main()
