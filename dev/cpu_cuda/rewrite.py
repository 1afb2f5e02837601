"""Turns preprocessed CUDA C++ into plain C++. Three constructs are left after preprocessing; every line keeps its number.

    kernel<<<grid, block>>>(a, b)      a call of cpu_cuda::launch
    __shared__ float x[4][C]           a reference to the block's one copy
    asm volatile("cp.async ...;" ..)   a call of the function that does what the instruction does
"""
import re

STRING = r'"(?:\\.|[^"\\\n])*"'
LITERAL = re.compile(STRING + r"|'(?:\\.|[^'\\\n]){1,4}'")
CONSTRUCT = re.compile(LITERAL.pattern + r'|<<\s*<(?!=)|\b__shared__\b|\basm\s*(?:(?:__)?volatile(?:__)?\s*)?\(')
OPENING, CLOSING = '([{', ')]}'
HERE = '{__builtin_FILE(), __builtin_LINE()}'


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
        match = re.compile(pattern).match(text, i) if depth == 0 else None
        if match:
            return match
        if depth < 0:
            break
    raise Unreadable(start, 'found no %s before the brackets close' % pattern)


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

def kernel_start(text, end):
    """Where the expression that names the kernel, ending at `end`, begins. Angles inside brackets are comparisons."""
    inside = angles = 0
    for i in range(len(text[:end].rstrip()) - 1, -1, -1):
        inside += (text[i] in CLOSING) - (text[i] in OPENING)
        if inside == 0:
            angles += (text[i] == '>') - (text[i] == '<')
        if inside == angles == 0 and text[i] == '(':
            return i
        if inside < 0 or (inside == angles == 0 and not re.match(r'[\w:<]', text[i])):
            return i + 1
    return 0


LAUNCH = '::cpu_cuda::launch(%s, %s, ::cpu_cuda::Shape(%s), [=](auto&... cpu_cuda_x) { %s(cpu_cuda_x...); }%s)'


def rewrite_launch(text, match):
    begin = kernel_start(text, match.start())
    kernel = text[begin:match.start()].strip()
    close = end_of(text, match.end(), r'>>\s*>\s*\(')
    end = end_of(text, close.end(), r'\)')
    arguments = re.sub(r'\b__null\b', 'nullptr', text[close.end():end.start()])
    return begin, end.end(), LAUNCH % (quoted(kernel), HERE, text[match.end():close.start()], kernel,
                                       ', ' + arguments if arguments.strip() else '')


# ------------------------------------------------------------------------------------------------
# __shared__ declarations

NAME = re.compile(r'(\w+)\s*(?:\[.*\]\s*)?$', re.S)
# The members of a class tell the variables' types and alignments; each variable lives by itself.
STATIC = 'static const char {0}_tag = 0; {1}& {0} = *({1}*)::cpu_cuda::shared_variable(&{0}_tag, sizeof({1}), {2});'
DYNAMIC = '{1}* {0} = ({1}*)::cpu_cuda::shared_dynamic();'


def rewrite_shared(text, match):
    before = re.compile(r'\b(extern|static)\s+$').search(text, max(0, match.start() - 20), match.start())
    begin = before.start() if before else match.start()
    external = bool(before) and before.group(1) == 'extern'
    end = end_of(text, match.end(), ';')
    declaration = text[match.end():end.start()].strip()
    names = [NAME.search(declarator) for declarator in split(declaration, ',', angles=True)]
    if not all(names) or '=' in declaration:
        raise Unreadable(begin, '__shared__ variables are declared one by name, without a value')
    if external:
        declaration = re.sub(r'\[\s*\]', '', declaration)
    members = 'cpu_cuda_shared_%d' % match.start()
    code = ['struct %s { %s; };' % (members, declaration)]
    for name in (name.group(1) for name in names):
        member = '%s::%s' % (members, name)
        code.append((DYNAMIC if external else STATIC).format(
            name, 'decltype(%s)' % member, '__alignof__(%s)' % member))
    return begin, end.end(), ' '.join(code)


# ------------------------------------------------------------------------------------------------
# asm volatile("instruction operands;" : outputs : inputs : clobbers)

OPERAND = re.compile(r'%(\d+)|(?<![\w.%])(\d+)(?![\w.])')


def operands_of(section):
    """The C++ expressions of `"+f"(d[0]), "r"(a)`."""
    return [re.sub(r'^' + STRING + r'\s*', '', part) for part in split(section, ',') if part]


def rewrite_asm(text, match):
    end = end_of(text, match.end(), r'\)')
    # `::` is an empty section; a scope's :: stands inside an operand's parentheses
    template, *sections = split(text[match.end():end.start()], ':')
    expressions = [e for section in sections[:2] for e in operands_of(section)]
    source = ''.join(s[1:-1] for s in re.findall(STRING, template)).replace('\\n', ' ').replace('\\t', ' ')
    calls = []
    for instruction in filter(None, (part.strip() for part in source.split(';'))):
        mnemonic, _, rest = instruction.partition(' ')
        if not re.match(r'[a-z][\w.:]*$', mnemonic):
            raise Unreadable(match.start(), 'asm: found %s, expected an instruction and its operands' % instruction)
        named = [expressions[int(n)] if n else literal for n, literal in OPERAND.findall(rest)]
        name = re.sub(r'::|\.', '_', mnemonic)
        calls.append('::cpu_cuda::ptx::%s(%s)' % (name, ', '.join([HERE] + named)))
    return match.start(), end.end(), '(' + ', '.join(calls) + ')'


# ------------------------------------------------------------------------------------------------

def rewrite(text):
    """The whole file. Raises Unreadable."""
    result, done, match = [], 0, CONSTRUCT.search(text)
    while match:
        word, i = match.group(0), match.end()
        if word[0] not in '"\'':
            change = rewrite_shared if word[0] == '_' else rewrite_asm if word[0] == 'a' else rewrite_launch
            begin, i, replacement = change(text, match)
            lines = text.count('\n', begin, i) - replacement.count('\n')
            result += [text[done:begin], replacement, '\n' * lines]
            done = i
        match = CONSTRUCT.search(text, i)
    return ''.join(result) + text[done:]


def place(text, position):
    """file:line of a position, from the preprocessor's line markers."""
    markers = list(re.finditer(r'^# (\d+) "([^"]*)".*\n', text[:position], re.M))
    if not markers:
        return 'line %d' % (text.count('\n', 0, position) + 1)
    last = markers[-1]
    return '%s:%d' % (last.group(2), int(last.group(1)) + text.count('\n', last.end(), position))
