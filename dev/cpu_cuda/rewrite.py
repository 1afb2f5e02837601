"""Turns preprocessed CUDA C++ into plain C++. Three constructs are left after preprocessing; every line keeps its number.

    kernel<<<grid, block>>>(a, b)      a call of cpu_cuda::launch
    __shared__ float x[4][C]           a reference to the block's one copy
    asm volatile("cp.async ...;" ..)   a call of the function that does what the instruction does
"""
import re

STRING = r'"(?:\\.|[^"\\\n])*"'
CHARACTER = r"'(?:\\.|[^'\\\n]){1,4}'"
LITERAL = re.compile(STRING + '|' + CHARACTER)
CONSTRUCT = re.compile(STRING + '|' + CHARACTER + r'|<<\s*<(?!=)|\b__shared__\b|\basm\b')
OPENING, CLOSING = '([{', ')]}'


class Unreadable(Exception):
    """(position in the text, what was found and expected)"""


def pieces(text, start=0):
    """Yields (index, character, depth) outside literals; depth is that of brackets open before it."""
    depth, i = 0, start
    while i < len(text):
        literal = LITERAL.match(text, i) if text[i] in '"\'' else None
        if literal:
            i = literal.end()
            continue
        yield i, text[i], depth
        depth += (text[i] in OPENING) - (text[i] in CLOSING)
        i += 1


def end_of(text, start, pattern):
    """The match of pattern at or after start that lies outside brackets and literals."""
    for i, _, depth in pieces(text, start):
        match = pattern.match(text, i) if depth == 0 else None
        if match or depth < 0:
            break
    if match:
        return match
    raise Unreadable(start, 'found no %s before the brackets close' % pattern.pattern)


def split(text, separator, angles=False):
    """Splits at separators outside brackets and literals; with angles, < > count as brackets."""
    parts, begin, angle = [], 0, 0
    for i, character, depth in pieces(text):
        if angles and depth == 0:
            angle += (character == '<') - (character == '>' and angle > 0)
        if character == separator and depth == 0 and angle == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [part.strip() for part in parts + [text[begin:]]]


def quoted(text):
    return '"' + ' '.join(text.split()).replace('\\', '\\\\').replace('"', '\\"') + '"'


# ------------------------------------------------------------------------------------------------
# kernel<<<grid, block, shared, stream>>>(arguments)

def opening_of(text, end, opening, closing):
    """Where the bracket that closes just before `end` was opened. Angles inside parentheses are comparisons."""
    depth = inside = 0
    for i in range(end - 1, -1, -1):
        if opening == '<':
            inside += (text[i] in CLOSING) - (text[i] in OPENING)
        if inside == 0:
            depth += (text[i] == closing) - (text[i] == opening)
        if depth == 0:
            return i
    raise Unreadable(end, 'found no %s that opens the kernel\'s name' % opening)


def kernel_start(text, end):
    """Where the expression that names the kernel, ending at `end`, begins."""
    i = len(text[:end].rstrip())
    if text[i - 1] == ')':
        return opening_of(text, i, '(', ')')
    if text[i - 1] == '>':
        i = len(text[:opening_of(text, i, '<', '>')].rstrip())
    return re.search(r'[\w:]*$', text[:i]).start()


ANGLES_CLOSE = re.compile(r'>>\s*>\s*\(')
PARENTHESIS_CLOSES = re.compile(r'\)')
LAUNCH = ('::cpu_cuda::launch({name}, {{__builtin_FILE(), __builtin_LINE()}}, ::cpu_cuda::Shape({shape}), '
          '[=](auto&... cpu_cuda_x) {{ {kernel}(cpu_cuda_x...); }}{comma}{arguments})')


def rewrite_launch(text, match):
    begin = kernel_start(text, match.start())
    kernel = text[begin:match.start()].strip()
    close = end_of(text, match.end(), ANGLES_CLOSE)
    shape = text[match.end():close.start()]
    end = end_of(text, close.end(), PARENTHESIS_CLOSES)
    arguments = re.sub(r'\b__null\b', 'nullptr', text[close.end():end.start()])
    call = LAUNCH.format(name=quoted(kernel), shape=shape, kernel=kernel,
                         comma=', ' if arguments.strip() else '', arguments=arguments)
    return begin, end.end(), call


# ------------------------------------------------------------------------------------------------
# __shared__ declarations

SEMICOLON = re.compile(';')
DECLARATOR = re.compile(r'^((?:\*\s*)*)([A-Za-z_]\w*)\s*((?:\[.*\]\s*)*)$', re.S)
LAST_NAME = re.compile(r'([A-Za-z_]\w*)\s*((?:\[[^\]]*\]\s*)*)$')
ALIGNMENT = re.compile(r'\balignas\s*\(((?:[^()]|\([^()]*\))*)\)')


def declare_shared(kind, pointer, name, dimensions, external, number):
    """One variable. The typedef lets T (&x)[4][C] be written for any T."""
    type_name = 'cpu_cuda_shared_%d' % number
    if external:
        dimensions = re.sub(r'^\[\s*\]', '', dimensions)
        return 'typedef %s %s%s%s; %s* %s = (%s*)::cpu_cuda::shared_dynamic();' % (
            kind, pointer, type_name, dimensions, type_name, name, type_name)
    return ('typedef %s %s%s%s; static const char %s_tag = 0; %s& %s = *(%s*)'
            '::cpu_cuda::shared_variable(&%s_tag, sizeof(%s), alignof(%s));') % (
        kind, pointer, type_name, dimensions, type_name, type_name, name, type_name,
        type_name, type_name, type_name)


def rewrite_shared(text, match):
    before = re.search(r'\b(extern|static)\s+$', text[max(0, match.start() - 20):match.start()])
    begin = match.start() - (len(before.group(0)) if before else 0)
    end = end_of(text, match.end(), SEMICOLON)
    # alignas may not stand in a typedef
    declaration = ALIGNMENT.sub(r'__attribute__((aligned(\1)))', text[match.end():end.start()])
    external = bool(before) and before.group(1) == 'extern'
    if re.match(r'\s*extern\b', declaration):
        declaration, external = re.sub(r'^\s*extern\b', '', declaration), True
    first, *others = split(declaration, ',', angles=True)
    name = LAST_NAME.search(first)
    if not name or '=' in declaration:
        raise Unreadable(begin, '__shared__ variables are declared one by name, without a value')
    kind = re.sub(r'[\s*]+$', '', first[:name.start()])
    variables = []
    for number, declarator in enumerate([first[len(kind):]] + others):
        parts = DECLARATOR.match(declarator.strip())
        if not parts:
            raise Unreadable(begin, 'cannot read the declarator %s' % declarator.strip())
        variables.append(declare_shared(kind, *parts.groups(), external, match.start() + number))
    return begin, end.end(), ' '.join(variables)


# ------------------------------------------------------------------------------------------------
# asm volatile("instruction operands;" : outputs : inputs : clobbers)

ASM = re.compile(r'asm\s*(?:volatile\b|__volatile__\b)?\s*\(')
OPERAND = re.compile(r'%(\d+)|(?<![\w.%])(\d+)(?![\w.])')


def operands_of(section):
    """The C++ expressions of `"+f"(d[0]), "r"(a)`."""
    parts = [part for part in split(section, ',') if part]
    return [re.sub(r'^' + STRING + r'\s*', '', part) for part in parts]


def rewrite_asm(text, match):
    opening = ASM.match(text, match.start())
    if not opening:
        return match.start(), match.end(), match.group(0)
    end = end_of(text, opening.end(), PARENTHESIS_CLOSES)
    # `::` is an empty section; a scope's :: stands inside an operand's parentheses
    template, *sections = split(text[opening.end():end.start()], ':')
    expressions = [e for section in sections[:2] for e in operands_of(section)]
    source = ''.join(s[1:-1] for s in re.findall(STRING, template)).replace('\\n', ' ').replace('\\t', ' ')
    calls = []
    for instruction in filter(None, (part.strip() for part in source.split(';'))):
        mnemonic, _, rest = instruction.partition(' ')
        if not re.match(r'[a-z][\w.:]*$', mnemonic):
            raise Unreadable(match.start(), 'asm: found %s, expected an instruction and its operands' % instruction)
        named = [expressions[int(n)] if n else literal for n, literal in OPERAND.findall(rest)]
        calls.append('::cpu_cuda::ptx::%s(%s)' % (
            re.sub(r'::|\.', '_', mnemonic),
            ', '.join(['{__builtin_FILE(), __builtin_LINE()}'] + named)))
    return match.start(), end.end(), '(' + ', '.join(calls) + ')'


# ------------------------------------------------------------------------------------------------

def rewrite(text):
    """The whole file. Raises Unreadable."""
    result, done, i = [], 0, 0
    while True:
        match = CONSTRUCT.search(text, i)
        if not match:
            return ''.join(result) + text[done:]
        word = match.group(0)
        i = match.end()
        if word[0] in '"\'':
            continue
        change = rewrite_shared if word == '__shared__' else rewrite_asm if word == 'asm' else rewrite_launch
        begin, end, replacement = change(text, match)
        lines = text.count('\n', begin, end) - replacement.count('\n')
        result += [text[done:begin], replacement, '\n' * lines]
        done = i = end


def place(text, position):
    """file:line of a position, from the preprocessor's line markers."""
    markers = list(re.finditer(r'^# (\d+) "([^"]*)".*\n', text[:position], re.M))
    if not markers:
        return 'line %d' % (text.count('\n', 0, position) + 1)
    last = markers[-1]
    return '%s:%d' % (last.group(2), int(last.group(1)) + text.count('\n', last.end(), position))
