"""Whether the tests notice mistakes: small ones are made in the mathematics and in the kernels, one at a time.

Each function gets a few mutations, drawn by a seed: a sign flipped, a term, a factor or a statement dropped,
an index swapped, off by one, a constant or a condition changed; and each kernel loses each of its barriers. A
copy of the tree is built with each and tested up to the first check that fails: the mathematics in double,
then in float, then in runs; a kernel on the CPU by the tests of its section, in bf16, in fp32, under
dev/cpu_cuda's checks and under AddressSanitizer. What nothing notices changes no result (the reason is in EQUIVALENT), or a test is
missing. The result is dev/MUTATIONS.md.
"""
import argparse
import bisect
import concurrent.futures
import hashlib
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLE = os.path.join(ROOT, "dev", "MUTATIONS.md")
FLAGS = ("-std=c11 -O1 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp "
         "-w -D_GNU_SOURCE").split()
BUILDS = {"double": ["test_gpt_mhc.c", "-DREAL=double"], "float": ["test_gpt_mhc.c"],
          "runs": ["host/test_checkpoint.c"]}
KERNEL_FLAGS = "-std=c++17 -O1 -D_GNU_SOURCE -Xcompiler -w,-fopenmp,-ffp-contract=fast".split()
KERNEL_BUILDS = {"bf16": ["-DPRECISION_BF16"], "fp32": ["-DPRECISION_FP32"],
                 "check": ["-DPRECISION_BF16", "--check"], "address": ["-DPRECISION_BF16", "--address"]}
MEMORY, FILE_SIZE, LEAST_SECONDS = 4 << 30, 256 << 20, 10

# Of the trainer everything up to its section about runs is mathematics, but for these: memory, places,
# threads, clocks (what they get wrong shows under a sanitizer or everywhere). Of what comes after, what
# decides about updates.
MATHEMATICS_ENDS = "// A run: options, model, data"
PLUMBING = set("""thread_count thread_index set_threads wait_briefly min_int matrix matmul_naive dim_size
    tensor_size at param grad model_add_tensor model_layout model_close activations_open activations_close carve
    layout_sublayer layout_states activations_layout model_memory row_of attention_scratch_size has_streams
    has_connections per_stream coefficient_count projection_M seconds measure_peak""".split())
FILES = {
    "train_gpt_mhc.c": set("""training_batch validation_windows validation_loss validation_entropy
        sample_token generate judge accumulate_gradients finish_step every recompute_block""".split()),
    "host/spikes.h": {"spikes_score", "spikes_accept"},
}

KERNELS = "train_gpt_mhc.cu"

# How the sections of the kernels begin -> the parts of test_gpt_mhc.cu that cover them; others: all of it
PARTS = {
    "Types, errors": ["over_a_block", "layernorm"],
    "Memory 16 bytes": ["add", "gelu", "layernorm"],
    "Sums over rows": ["sum_columns", "layernorm"],
    "tanh approximation": ["gelu", "linear"],
    "embedding": ["embedding"],
    "LayerNorm": ["layernorm", "readout", "connections_forward"],
    "readout": ["readout"],
    "residual": ["add"],
    "classifier": ["classifier"],
    "Hyper-connections": ["connections", "coefficients"],
    "Sinkhorn-Knopp": ["coefficients", "connections"],
    "The way forward": ["connections", "coefficients"],
    "The way back": ["connections_backward"],
    "fn's gradient": ["connections_backward"],
    "A connection's way back": ["connections_backward"],
    "Causal attention": ["attention"],
    "Plain attention": ["attention"],
    "Flash attention": ["attention"],
    "norm": ["gradient_norm"],
    "copies": ["adamw", "copies", "rounding"],
    "AdamW": ["adamw"],
    "what is not finite": ["first_nonfinite"],
    "The machine": ["sum_parts", "step", "training"],
}

# Mutations that change no result: (function, the line afterwards) -> why
EQUIVALENT = {
    ("softmax_causal", "for (int j = 0; j <= t; j++) max = row[j] > max ? row[j] : max;"):
        "the first is compared with itself",
    ("exp_real", "float halves = z * 1.44269504f + (z <= 0 ? -0.5f : 0.5f);"):
        "both halves are cut to a power of 0 at z = 0",
    ("connection_write_backward", "for (int r = 0; r <= rows; r++) {"):
        "the row after the last lies in scratch that is written anew before it is read",
    ("place_of", "return source_of(c, m) * (c->n + 2) + "
                 "(m <= 2 * c->n ? m / c->n : 2 + (m - 2 * c->n) / c->n);"):
        "at m = 2n both are 2",
    ("square_sum", "double sums[PIECES] = {1};"): "each is written before it is added",
    ("matmul", "while (rows > 8 * TILE_ROWS && chunks(M, rows) * panels < 3 )"):
        "how rows are divided among threads changes no sum",
    ("matmul", "for (int i0 = 0; i0 <= M; i0 += rows)"): "a block without rows does nothing",
    ("coef_neutral", "return m < N ? 1.0f / n : m <= 2 * N || (m - 2 * N) / N == m % N ? 1 : 0;"):
        "at m = 2N, which is on the diagonal, both are 1",
    ("token_logits", "a[m] = m < c.M ? factor * coef_gate<N>(m, mix, c) + base[m] : 1;"): "none is read from M on",
    ("block_sum", "return block_combine(x, 2 * 0.0f, [](float v) { return warp_sum(v); });"): "twice 0 is 0",
    ("warp_max", "for (int distance = WARP * 2; distance > 0; distance /= 2)"):
        "a lane beyond the warp gives a lane's own value, and max(x, x) = x",
    ("block_combine", "if (lane == 1) partial[warp] = x;"): "every lane has its warp's value",
    ("recompute_block", "return block < 1 ? 1 : block < 3 * run->c.L ? (int)block : 2 * run->c.L;"):
        "more than 2L is refused as an option, and never automatic",
}

# --- tokens

TOKEN = re.compile(r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/)|(?P<macro>^[ \t]*\#(?:\\\n|[^\n])*)
    |(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|(?P<number>\.?\d(?:[eE][+-]|[\w.])*)|(?P<name>[A-Za-z_]\w*)
    |(?P<op><<=|>>=|->|\+\+|--|<<|>>|[<>=!+*/%&|^-]=|&&|\|\||.)""", re.X | re.M | re.S)
TYPES = set("""real double float int long bool char void const unsigned static size_t
    floatX float2 uint4 auto constexpr""".split())
KEYWORDS = set("return if for while switch case else do".split())
UNARY = {"-", "+", "!", "*", "&", "~"}
CLOSING = {"(": ")", "[": "]", "{": "}"}


class Code:
    """The tokens of one file, without blanks, comments and preprocessor lines; each bracket's partner;
    and the bracket around each token."""

    def __init__(self, path, text):
        self.path, self.text, self.tokens, self.partner, self.around = path, text, [], {}, []
        self.is_cuda = path == KERNELS
        position, stack = 0, []
        while position < len(text):
            match = TOKEN.match(text, position)
            if match.lastgroup == "macro":
                position = match.end()
                continue
            if match.lastgroup != "skip":
                self.around.append(stack[-1] if stack else None)
                self.tokens.append((match.group(), match.start(), match.end(), match.lastgroup))
                if match.group() in CLOSING:
                    stack.append(len(self.tokens) - 1)
                elif match.group() in CLOSING.values():
                    opened = stack.pop()
                    self.partner[opened], self.partner[len(self.tokens) - 1] = len(self.tokens) - 1, opened
            position = match.end()
        self.line_starts = [0] + [m.end() for m in re.finditer("\n", text)]

    def __getitem__(self, i):
        return self.tokens[i][0]

    def kind(self, i):
        return self.tokens[i][3]

    def is_type(self, i):
        return self[i] in TYPES or self[i].endswith("_t") or bool(re.match("[A-Z][a-z]", self[i]))

    def is_cast(self, i):
        """Whether the bracket that opens at i holds a type."""
        inside = range(i + 1, self.partner.get(i, 0))
        return self[i] == "(" and all(self.is_type(j) or self[j] == "*" for j in inside)

    def is_template(self, i):
        """Whether < or > is a bracket: a comparison has blanks around it."""
        return not self.text[self.tokens[i][1] - 1].isspace()

    def ends_operand(self, i):
        if self[i] == ")":
            opened = self.partner[i]
            return not self.is_cast(opened) or self[opened - 1] == "sizeof"
        return self[i] == "]" or self.kind(i) == "number" or (
            self.kind(i) == "name" and self[i] not in KEYWORDS and not self.is_type(i))

    def is_binary(self, i):
        return self.ends_operand(i - 1)

    def operand_end(self, i):
        """The token after the operand that starts at i, with its signs, casts, calls and indices."""
        while self[i] in UNARY or self.is_cast(i):
            i = self.partner[i] + 1 if self[i] == "(" else i + 1
        i = self.partner[i] + 1 if self[i] == "(" else i + 1
        while self[i] in ("(", "[", ".", "->"):
            i = self.partner[i] + 1 if self[i] in CLOSING else i + 2
        return i

    def operand_start(self, i):
        """The first token of the operand that ends at i."""
        while True:
            if self[i] in (")", "]"):
                i = self.partner[i]
                if not self.ends_operand(i - 1):
                    break
                i -= 1
            elif self[i - 1] in (".", "->"):
                i -= 2
            else:
                break
        while self[i - 1] == ")" and self.is_cast(self.partner[i - 1]):
            i = self.partner[i - 1]
        return i

    def functions(self):
        """(name, first and last token of its body) of each function."""
        i = 0
        while i < len(self.tokens):
            if self[i] != "{":
                i += 1
                continue
            last = i - 2 if self[i - 1] == "const" else i - 1
            opened = self.partner.get(last) if self[last] == ")" else None
            if opened is not None and self.kind(opened - 1) == "name":
                yield self[opened - 1], i, self.partner[i]
            i = i + 1 if self.is_cuda and self[i - 2] == "struct" else self.partner[i] + 1

    def on_device(self, first):
        """Whether the function whose body begins at this token is a kernel or a part of one."""
        start = first - 1
        while start > 0 and not (self[start] in (";", "{", "}") and self.around[start] == self.around[first]):
            start -= 1
        return any(self[i] in ("__global__", "__device__") for i in range(start, first))

    def section(self, first):
        """The parts of the tests that cover the function whose body begins at this token."""
        parts, position = [""], self.tokens[first][1]
        for rule, title in re.findall(r"^// (-{90,}\n// |--- )(.*)", self.text[:position], re.M):
            known = [PARTS[start] for start in PARTS if title.startswith(start)]
            parts = known[0] if known else [""] if len(rule) > 90 else parts
        return parts

    def span(self, first, last):
        return self.tokens[first][1], self.tokens[last][2]

    def replace(self, i, text):
        return [(*self.span(i, i), text)]

    def drop(self, first, last):
        return [(*self.span(first, last), "")]


# --- mutations: each is a list of (start, end, text) in the file

OTHER_SIGN = {"+": "-", "-": "+", "+=": "-=", "-=": "+=", "/": "*", "*=": "/="}
OTHER_BOUND = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
OTHER_LOGIC = {"&&": "||", "||": "&&", "==": "!=", "!=": "==", "true": "false", "false": "true",
               "fmax": "fmin", "fmin": "fmax"}
INDICES = set("t k r i j e l v h b c ch row place".split())
KERNEL_INDICES = INDICES | set("m n s o at col lane warp stage head query".split())
ARGUMENTS = set("t k r i j l row".split())


def other_number(text):
    match = re.fullmatch(r"(\d+)([uUlL]*)", text)
    if not match:
        return [] if text.startswith("0x") else ["2 * " + text]
    value = int(match.group(1))
    return [str(v) + match.group(2) for v in (value - 1, value + 1) if v >= 0]


# What orders threads: in CUDA, and in PTX
BARRIER = re.compile(r"__sync(threads|warp)\w*|__threadfence\w*|cp_async_(wait|commit)\w*|\w*(barrier|fence)\w*")
PTX_BARRIER = re.compile(r"\b(commit_group|wait_group|bar\.|barrier|fence|membar)")


def sign_mutations(code, i, end):
    if code[i] in OTHER_SIGN and code.is_binary(i):
        yield "sign", code.replace(i, OTHER_SIGN[code[i]])
    if code[i] in ("+=", "-="):
        yield "sign", code.replace(i, "=")


def term_mutations(code, i, end):
    if code[i] in ("*", "/", "%") and code.is_binary(i):
        yield "term", code.drop(i, code.operand_end(i + 1) - 1)
        if code[i] == "*":
            yield "term", code.drop(code.operand_start(i - 1), i)
    if code[i] in ("+", "-") and code.is_binary(i):
        last, first = code.operand_end(i + 1), code.operand_start(i - 1)
        while code[last] in ("*", "/", "%"):
            last = code.operand_end(last + 1)
        yield "term", code.drop(i, last - 1)
        while code[first - 1] in ("*", "/", "%") and code.is_binary(first - 1):
            first = code.operand_start(first - 2)
        if code[first - 1] not in ("+", "-"):
            yield "term", code.drop(first, i)


def statement_mutations(code, i, end):
    """An assignment or a call that is a statement of its own goes."""
    if code[i - 1] not in (";", "{", "}", ")", "else") or code.kind(i) != "name" or code[i] in KEYWORDS:
        return
    if BARRIER.fullmatch(code[i]):
        return
    if code[code.around[i]] != "{":
        return
    if code[i - 1] == ")" and code[code.partner[i - 1] - 1] not in ("if", "for", "while"):
        return
    last = i
    while last < end and code[last] not in (";", "{", "}"):
        last = code.partner[last] + 1 if code[last] in ("(", "[") else last + 1
    declares = code.is_type(i) or code.kind(i + 1) == "name"
    if code[last] == ";" and not declares and code[i] not in ("break", "continue", "default"):
        yield "statement", code.drop(i, last - 1)


def index_mutations(code, i, end):
    if code[i] == "*" and i + 3 < end and code.is_binary(i) and code[i + 2] == "+":
        simple = all(code.kind(j) == "name" for j in (i - 1, i + 1, i + 3)) and code[i - 2] not in (".", "->")
        following = code[i + 4]
        if simple and following == "*" and code.kind(i + 5) == "name":  # a * b + c * d: strides swapped
            yield "index", code.replace(i + 1, code[i + 5]) + code.replace(i + 5, code[i + 1])
        elif simple and following not in ("*", "(", "[", ".", "->") and code[i - 1] != code[i + 3]:
            yield "index", code.replace(i - 1, code[i + 3]) + code.replace(i + 3, code[i - 1])
    if code[i] == "matrix" and code[i + 1] == "(":                          # transposed
        commas, depth = [], 0
        for j in range(i + 2, code.partner[i + 1]):
            depth += (code[j] in ("(", "[")) - (code[j] in (")", "]"))
            if code[j] == "," and not depth:
                commas.append(j)
        if len(commas) == 2:
            row = code.span(commas[0] + 1, commas[1] - 1)
            col = code.span(commas[1] + 1, code.partner[i + 1] - 1)
            yield "index", [(*row, code.text[slice(*col)]), (*col, code.text[slice(*row)])]


    if code[i] in ("threadIdx", "blockIdx") and code[i + 2] in ("x", "y"):
        yield "index", code.replace(i + 2, "y" if code[i + 2] == "x" else "x")


def barrier_mutations(code, i, end):
    """A barrier goes, or waits for less."""
    if code[i] == "asm":
        last = code.partner[i + 1 if code[i + 1] == "(" else i + 2]
        if any(PTX_BARRIER.search(code[j]) for j in range(i, last)):
            yield "barrier", code.drop(i, last)
    if not BARRIER.fullmatch(code[i]):
        return
    if code[i + 1] == "<":
        yield "barrier", code.replace(i + 2, str(int(code[i + 2]) + 1))
    last = code.partner[i + 1 if code[i + 1] == "(" else i + 4]
    if code[i - 1] in (";", "{", "}", ")", "else") and code[last + 1] == ";":
        yield "barrier", code.drop(i, last)
    else:                                                                   # one with a value: keeps its own
        yield "barrier", code.drop(i, i)


def bound_mutations(code, i, end):
    if code[i] in OTHER_BOUND and code.is_binary(i) and not code.is_template(i):
        yield "bound", code.replace(i, OTHER_BOUND[code[i]])
    indices = KERNEL_INDICES if code.is_cuda else INDICES
    if (code[i] in indices and code[i - 1] == "[" and code[i + 1] == "]") or (
            code[i] in ARGUMENTS and code[i - 1] in ("(", ",") and code[i + 1] in (")", ",")):
        yield "bound", code.replace(i, code[i] + " + 1")
        yield "bound", code.replace(i, code[i] + " - 1")


def constant_mutations(code, i, end):
    if code.kind(i) == "number" and not (code[i - 1] == "<" and BARRIER.fullmatch(code[i - 2])):
        for text in other_number(code[i]):
            yield "constant", code.replace(i, text)


def logic_mutations(code, i, end):
    if code[i] in OTHER_LOGIC:
        yield "logic", code.replace(i, OTHER_LOGIC[code[i]])
    if code[i] == "!" and code[i + 1] != "!":
        yield "logic", code.drop(i, i)


MUTATORS = (sign_mutations, term_mutations, statement_mutations, index_mutations, bound_mutations,
            constant_mutations, logic_mutations)


class Mutation:
    def __init__(self, code, function, kind, edits, parts=()):
        self.code, self.function, self.kind, self.edits, self.parts = code, function, kind, edits, parts
        first = bisect.bisect_right(code.line_starts, min(e[0] for e in edits)) - 1
        last = bisect.bisect_right(code.line_starts, max(e[1] for e in edits) - 1)
        start, end = code.line_starts[first], code.line_starts[last]
        self.line = first + 1
        self.before = squeeze(code.text[start:end])
        self.after = squeeze(self.apply(start, end))

    def apply(self, start, end):
        """The text from start to end, mutated. Lines keep their numbers."""
        text = ""
        for first, last, new in sorted(self.edits):
            text += self.code.text[start:first] + new + "\n" * self.code.text[first:last].count("\n")
            start = last
        return text + self.code.text[start:end]

    def mutant(self):
        return self.apply(0, len(self.code.text))

    def key(self):
        return self.function, self.before, self.after


def squeeze(lines):
    """Lines as one, without comments, for the table."""
    return " ".join(re.sub(r"//.*", "", lines).split())


def function_mutations(code, function, first, last, seed):
    """All mutations of a function, in the order in which they are tried: barriers, then each kind in turn."""
    kinds, barriers, parts = {}, [], code.section(first) if code.is_cuda else ()
    i = first + 1
    while i < last:
        if code[i] in ("assert", "static_assert", "enum"):
            i = code.partner[i + 1] + 1
            continue
        for mutator in MUTATORS:
            for kind, edits in mutator(code, i, last):
                kinds.setdefault(kind, []).append(Mutation(code, function, kind, edits, parts))
        if code.is_cuda:
            barriers += [Mutation(code, function, *found, parts) for found in barrier_mutations(code, i, last)]
        i += 1
    draw = random.Random("%d %s" % (seed, function))
    order = sorted(kinds)
    draw.shuffle(order)
    for kind in order:
        draw.shuffle(kinds[kind])
    found = barriers
    while any(kinds.values()):
        found += [kinds[kind].pop() for kind in order if kinds[kind]]
    return found


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def all_functions(codes, seed):
    """[(name, its mutations)] of every function that is looked at, by name."""
    found = []
    for code in codes:
        mathematics = max(code.text.find(MATHEMATICS_ENDS), 0)
        for name, first, last in code.functions():
            early = code.tokens[first][1] < mathematics and name not in PLUMBING
            if code.on_device(first) if code.is_cuda else early or name in FILES[code.path]:
                found.append((name, function_mutations(code, name, first, last, seed)))
    return sorted(found, key=lambda f: f[0])


# --- building and testing

UNCHANGED = "builds to the same program"


class Workshop:
    """A copy of the tree in which one mutant at a time is built and tested."""
    LIMITS, PATIENCE = {resource.RLIMIT_AS: MEMORY}, 100
    ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}        # spinning threads would waste hours

    def __init__(self, where, codes):
        self.where, self.seconds, self.hash = where, LEAST_SECONDS, {}
        os.makedirs(os.path.join(where, "tmp"))
        for folder in (".", "host", "data"):
            os.makedirs(os.path.join(where, folder), exist_ok=True)
            for name in os.listdir(os.path.join(ROOT, folder)):
                path, copy = os.path.join(ROOT, folder, name), os.path.join(where, folder, name)
                if name.endswith((".c", ".h", ".cu")):      # what a mutant leaves behind must not stay in /tmp
                    self.put(os.path.join(folder, name), read(path).replace('"/tmp/', '"tmp/'))
                elif not os.path.exists(copy) and name not in (".git", "build", "host", "data"):
                    os.symlink(path, copy)
        for code in codes:
            self.put(code.path, code.text)

    def put(self, path, text):
        with open(os.path.join(self.where, path), "w", encoding="utf-8") as file:
            file.write(text)

    def build(self, name):
        """A hash of the program; None if it does not build."""
        program = os.path.join(self.where, "test_" + name)
        done = subprocess.run(self.command(name, program), cwd=self.where, check=False,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if done.returncode:
            return None
        with open(program, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def command(self, name, program):
        return [os.environ.get("CC", "gcc"), *FLAGS, *BUILDS[name], "-o", program, "-Wl,--build-id=none", "-lm"]

    def limit(self):
        for what, most in ((resource.RLIMIT_CPU, int(self.seconds)), (resource.RLIMIT_FSIZE, FILE_SIZE),
                           (resource.RLIMIT_CORE, 0), *self.LIMITS.items()):
            resource.setrlimit(what, (most, most))

    def test(self, name, *words):
        """The first check that fails, or how else the program ends badly; None if it passes."""
        ours, theirs = pty.openpty()            # to a terminal it prints line by line
        environment = dict(os.environ, **self.ENVIRONMENT)
        program = subprocess.Popen(["./test_" + name, *words], cwd=self.where, env=environment,
                                   stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
                                   start_new_session=True, preexec_fn=self.limit)
        os.close(theirs)
        timer = threading.Timer(self.PATIENCE * self.seconds, os.killpg, (program.pid, signal.SIGKILL))
        timer.start()
        failed, passed = None, False
        try:
            with os.fdopen(ours, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    passed = passed or re.match(r"\d+ passed, 0 failed", line)
                    found = re.match(r"FAIL (compare:\d+: )?(.*)|cpu_cuda: ([^:]*)|.*(?:AddressSanitizer|runtime error): ([\w -]*)", line)
                    if found:
                        failed = " ".join((found.group(2) or found.group(3) or found.group(4)).split())
                        os.killpg(program.pid, signal.SIGKILL)
                        break
        except OSError:                         # how a terminal says that the other side has closed
            pass
        status = program.wait()
        timer.cancel()
        for leftover in os.listdir(os.path.join(self.where, "tmp")):
            shutil.rmtree(os.path.join(self.where, "tmp", leftover), ignore_errors=True)
        if failed or (passed and not status):
            return failed
        if status in (-signal.SIGXCPU, -signal.SIGKILL):
            return "time-out"
        return "crash (%s)" % signal.Signals(-status).name if status < 0 else "ends with status %d" % status

    def prepare(self, functions):
        """Without a mutation everything must pass; how long that takes sets the limit."""
        self.seconds = 600
        slowest = 0
        for name, flags in BUILDS.items():
            self.hash[name] = self.build(name)
            if not self.hash[name]:
                sys.exit("mutate.py: does not build: %s" % " ".join(FLAGS + flags))
            start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            failed = self.test(name)
            if failed:
                sys.exit("mutate.py: the tests fail without a mutation, in %s: %s" % (name, failed))
            slowest = max(slowest, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start)
        self.seconds = LEAST_SECONDS + 2 * slowest

    def judge(self, mutation):
        """What catches it, "" if nothing does; None if it does not build or builds to the same program."""
        self.put(mutation.code.path, mutation.mutant())
        try:
            same = True
            for name in BUILDS:
                built = self.build(name)
                if not built:
                    return None
                same = same and built == self.hash[name]
                failed = built != self.hash[name] and self.test(name)
                if failed:
                    return "%s: %s" % (name, failed)
            return None if same else ""
        finally:
            self.put(mutation.code.path, mutation.code.text)


class KernelWorkshop(Workshop):
    """For the kernels, run on the CPU: the parts of test_gpt_mhc.cu that cover one, and nothing else of it."""
    LIMITS, PATIENCE = {}, 20                   # device memory is a reserved range of addresses
    ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CPU_CUDA": "threads=1", "ASAN_OPTIONS": "detect_leaks=0"}

    def command(self, name, program):
        return ["dev/cpu_cuda/nvcc", *KERNEL_FLAGS, *KERNEL_BUILDS[name], "test_gpt_mhc.cu", "-o", program]

    def build(self, name):
        """As the other's, but lines' and files' names do not count."""
        program = os.path.join(self.where, "test_" + name)
        if not super().build(name):
            return None
        subprocess.run(["strip", "-o", program + ".bare", program], check=True)
        with open(program + ".bare", "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def choose(self, parts):
        self.put("test_gpt_mhc.cu", re.sub(
            r'^ *\{"(\w+)", test_\w+\},\n', lambda m: m.group() if any(p in m.group(1) for p in parts) else "",
            read(os.path.join(ROOT, "test_gpt_mhc.cu")).replace('"/tmp/', '"tmp/'), flags=re.M))

    def prepare(self, functions):
        self.hash = {}                          # by program and parts, and how long its tests take

    def before(self, name, parts):
        """Without a mutation everything must pass."""
        if (name, *parts) not in self.hash:
            self.seconds = 600
            built, start = self.build(name), time.monotonic()
            failed = self.test(name) if built else "does not build"
            if failed:
                sys.exit("mutate.py: without a mutation, %s %s: %s" % (name, " ".join(parts), failed))
            self.hash[name, *parts] = built, LEAST_SECONDS + 3 * (time.monotonic() - start)
        return self.hash[name, *parts]

    def judge(self, mutation):
        """Threads out of order are soonest seen by a check; what bf16 hides, by fp32."""
        names = ["bf16", "check", "fp32"] if mutation.kind == "barrier" else ["bf16", "fp32", "check"]
        verdict = UNCHANGED
        self.choose(mutation.parts)
        for name in names + ["address"]:
            self.put(KERNELS, mutation.code.text)
            same, self.seconds = self.before(name, mutation.parts)
            self.put(KERNELS, mutation.mutant())
            built = self.build(name)
            if not built:
                return None
            failed = self.test(name) if built != same else None
            if failed:
                return failed if name == "bf16" else "%s: %s" % (name, failed)
            verdict = verdict if built == same else ""
        return verdict


# --- the table

class Result:
    def __init__(self, function, before, after, caught):
        self.function, self.before, self.after = function, before, after
        self.caught = "" if caught == UNCHANGED else caught
        self.reason = caught if caught == UNCHANGED else "" if caught else EQUIVALENT.get((function, after), "")

    def verdict(self):
        return "caught" if self.caught else "equivalent" if self.reason else "SURVIVES"

    def line(self):
        return "%-10s %s: %s -> %s: %s" % (self.verdict(), self.function, self.before, self.after,
                                           self.caught or self.reason or "a check is missing")


def cell(text):
    return "`%s`" % text.replace("|", "\\|") if text else ""


INTRODUCTION = """# Mutations

`make mutate` makes small mistakes in the mathematics and in the kernels, one at a time, and runs the tests on each
(mutate.py). Those that do not build do not count.
"""
ABOUT = {
    "Mathematics": """Seed %d, up to %d for each of %d functions of %d: %d mutants, %d caught, %d equivalent (they change no result,
the reason is beside them), %d survive (a check is missing).
""",
    "Kernels": """On the CPU, by dev/cpu_cuda: the tests of the kernel's section in bf16, or where that is said in fp32 or under the checks.
Seed %d, every barrier of a kernel and up to %d other mutants, for each of %d functions of %d: %d mutants, %d caught,
%d equivalent (they change no result, the reason is beside them), %d survive (a check is missing).
""",
}


def sections():
    """The table's text by subject"""
    text = read(TABLE) if os.path.exists(TABLE) else ""
    found = re.split(r"^## (.*)\n", text, flags=re.M)
    return dict(zip(found[1::2], found[2::2]))


def write_table(subject, results, args, functions):
    verdicts = [r.verdict() for r in results]
    text = "\n" + ABOUT[subject] % (
        args.seed, args.per_function, len({r.function for r in results}), functions, len(results),
        verdicts.count("caught"), verdicts.count("equivalent"), verdicts.count("SURVIVES"))
    text += "\n### Not caught\n\n| function | line | becomes | why |\n|---|---|---|---|\n"
    for r in sorted(results, key=lambda r: (bool(r.reason), r.function)):
        if not r.caught:
            text += "| %s | %s | %s | %s |\n" % (r.function, cell(r.before), cell(r.after), r.reason)
    text += "\n### Caught\n\n| function | line | becomes | first check that fails |\n|---|---|---|---|\n"
    for r in sorted(results, key=lambda r: r.function):
        if r.caught:
            text += "| %s | %s | %s | %s |\n" % (r.function, cell(r.before), cell(r.after),
                                                r.caught.replace("|", "\\|"))
    all_sections = dict(sections(), **{subject: text})
    with open(TABLE, "w", encoding="utf-8") as file:
        file.write(INTRODUCTION + "".join("\n## %s\n%s\n" % (name, all_sections[name].rstrip("\n"))
                                          for name in ABOUT if name in all_sections))


def read_table(subject):
    """What the table shows as caught: (function, before, after) -> by what"""
    found = {}
    for line in sections().get(subject, "").partition("\n### Caught\n")[2].split("\n"):
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4:
            found[cells[0], cells[1].strip("`"), cells[2].strip("`")] = cells[3]
    return found


# --- main

def mutants_of(name, mutations, workshop, args, known):
    """Results of all barriers, and of the first other mutations that are mutants; known ones as they are."""
    results, others = [], 0
    for mutation in mutations:
        if others == args.per_function:
            break
        caught = known[mutation.key()] if mutation.key() in known else workshop.judge(mutation)
        if caught is None:
            continue
        others += mutation.kind != "barrier" and caught != UNCHANGED
        results.append(Result(*mutation.key(), caught))
        print(results[-1].line(), flush=True)
    return results


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seed", type=int, default=1, help="of the draw (1)")
    parser.add_argument("--per-function", type=int, default=2, help="mutants of each function (2)")
    parser.add_argument("--subject", choices=ABOUT, help="only this one")
    parser.add_argument("--function", help="only this one; the table stays as it is")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (1)")
    parser.add_argument("--list", action="store_true", help="print the mutations in the order they are tried")
    parser.add_argument("--again", action="store_true", help="but those that the table shows as caught")
    args = parser.parse_args()
    found, verdicts = False, []
    for subject, paths in (("Mathematics", FILES), ("Kernels", [KERNELS])):
        codes = [Code(path, read(os.path.join(ROOT, path))) for path in paths]
        functions = [f for f in all_functions(codes, args.seed) if args.function in (None, f[0])]
        if not functions or args.subject not in (None, subject):
            continue
        found = True
        if args.list:
            for name, mutations in functions:
                for m in mutations[:args.per_function + sum(m.kind == "barrier" for m in mutations)]:
                    print("%s:%d: %s, %s: %s -> %s" % (m.code.path, m.line, name, m.kind, m.before, m.after))
        else:
            verdicts += run(subject, codes, functions, args)
    if not found:
        sys.exit("mutate.py: found no function %s, expected one that computes" % args.function)
    sys.exit(1 if "SURVIVES" in verdicts else 0)


def run(subject, codes, functions, args):
    """The verdicts on a subject's mutants. In an order of chance: a run that is stopped has seen all sections."""
    random.Random(args.seed).shuffle(functions)
    known = read_table(subject) if args.again else {}
    results = []
    shop_of = Workshop if subject == "Mathematics" else KernelWorkshop
    with tempfile.TemporaryDirectory(prefix="mutate.") as scratch:
        shops = [shop_of(os.path.join(scratch, str(j)), codes) for j in range(args.jobs)]
        shops[0].prepare(functions)
        for shop in shops[1:]:
            shop.seconds, shop.hash = shops[0].seconds, shops[0].hash

        def work(function):
            shop = shops.pop()
            try:
                return mutants_of(*function, shop, args, known)
            finally:
                shops.append(shop)

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for found in pool.map(work, functions):
                results += found
                if not args.function:           # anew each time, so that nothing is lost when it is stopped
                    write_table(subject, results, args, len(functions))
    verdicts = [r.verdict() for r in results]
    print("%s: %d mutants: %d caught, %d equivalent, %d survive" % (
        subject, len(results), verdicts.count("caught"), verdicts.count("equivalent"),
        verdicts.count("SURVIVES")))
    return verdicts


if __name__ == "__main__":
    main()
