#!/usr/bin/env python3
"""What rewrite.py makes of launches, shared variables and asm, and what it refuses."""
import os
import re
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), '..'))
import rewrite  # noqa: E402

HERE = '{__builtin_FILE(), __builtin_LINE()}'


def launch(kernel, shape, arguments):
    return '::cpu_cuda::launch("%s", %s, ::cpu_cuda::Shape(%s), [=](auto&... cpu_cuda_x) { %s(cpu_cuda_x...); }%s)' % (
        kernel, HERE, shape, kernel, ', ' + arguments if arguments else '')


SAME = [
    'a << b;', 'x <<= 3;', 'puts("k<<<1, 2>>>(3)");', "c = '\"'; d = '<';", 'int f(int (*asmx)(int));',
]
LAUNCHES = {
    'k<<<1, 2>>>();': launch('k', '1, 2', '') + ';',
    'ns::k<<<dim3(1, 2), n < 3 ? 4 : 5, sizeof(float[4]), s>>>(a, b(1, 2));':
        launch('ns::k', 'dim3(1, 2), n < 3 ? 4 : 5, sizeof(float[4]), s', 'a, b(1, 2)') + ';',
    'k<float, (4 < 5)><<<1, 2>>>(__null);': launch('k<float, (4 < 5)>', '1, 2', 'nullptr') + ';',
    'k<A<B>, 3> <<<1, 2>>> (x);': launch('k<A<B>, 3>', '1, 2', 'x') + ';',
    'table[i].f; (*pointer)<<<1, 2>>>(">>>(");': 'table[i].f; ' + launch('(*pointer)', '1, 2', '">>>("') + ';',
}
ASM = {
    'asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\\n" ::"r"(a), "l"(p + 1));':
        '(::cpu_cuda::ptx::cp_async_cg_shared_global(%s, (a), (p + 1), 16));' % HERE,
    'asm volatile("mma.x {%0,%1}, {%2}, {%0,%1};" : "+f"(d[0]), "+f"(d[1]) : "r"(ns::n));':
        '(::cpu_cuda::ptx::mma_x(%s, (d[0]), (d[1]), (ns::n), (d[0]), (d[1])));' % HERE,
    'asm("a.b; a::c %0;" ::"n"(N) : "memory");':
        '(::cpu_cuda::ptx::a_b(%s), ::cpu_cuda::ptx::a_c(%s, (N)));' % (HERE, HERE),
}
REFUSED = ['k<<<1, 2>>>(3', '__shared__ int x = 3;', 'asm("@p bra done;");', 'k<<<1, 2>>> + 3;', '__shared__ int (*x)[3];']


def variables(declaration):
    """The class's members, and the variables that the rewritten declaration makes."""
    text = rewrite.rewrite(declaration)
    return re.findall(r'^struct cpu_cuda_shared_\d+ { (.*?); };', text) + re.findall(r'[&*] (\w+) = ', text)


def attempt(function, text):
    try:
        return function(text)
    except rewrite.Unreadable:
        return 'refused'


def main():
    cases = [(rewrite.rewrite, text, text) for text in SAME]
    cases += [(rewrite.rewrite, text, result) for text, result in {**LAUNCHES, **ASM}.items()]
    cases += [(rewrite.rewrite, text, 'refused') for text in REFUSED]
    cases += [
        (variables, '__shared__ float x[4][C];', ['float x[4][C]', 'x']),
        (variables, 'static __shared__ A<B, 2> a, *b[3];', ['A<B, 2> a, *b[3]', 'a', 'b']),
        (variables, 'extern __shared__ __align__(16) char s[];', ['__align__(16) char s', 's']),
        (variables, 'extern __shared__ float s[][4];', ['float s[4]', 's']),
        (lambda text: rewrite.rewrite(text).count('\n'), 'k\n<<<1,\n 2>>>(\n3\n);\n__shared__ int\nx;', 6),
        (lambda text: rewrite.place(text, text.index('!')), '# 7 "a.cu"\nx\n! y', 'a.cu:8'),
    ]
    failed = 0
    for function, text, expected in cases:
        found = attempt(function, text)
        if found != expected:
            failed += 1
            print('FAIL %s\n  found    %s\n  expected %s' % (text, found, expected))
    print('%d passed, %d failed' % (len(cases) - failed, failed))
    sys.exit(failed > 0)


main()
