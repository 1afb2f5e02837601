// test_options.c: what people type, what they mistype, and what comes back from a checkpoint.

#include <limits.h>
#include <unistd.h>

#include "check.h"
#include "options.h"

static Options o;               // of the last parse()
static OptionsGiven given;
static Error e;

// Parses a command line whose words stand between bars.
static bool parse(const char* words) {
    static char copy[3 * OPTION_SIZE];
    char* argv[16];
    int argc = 0;
    snprintf(copy, sizeof copy, "train|%s", words);
    char* word = copy;
    for (char* bar = copy; bar && argc < 16; word = bar + 1) {
        bar = strchr(word, '|');
        if (bar) *bar = 0;
        argv[argc++] = word;
        if (!bar) break;
    }
    memset(&e, 0, sizeof e);
    return options_parse(&o, &given, words[0] ? argc : 1, argv, &e);
}

// Refused, in one line without control characters, and the line is exactly this.
static void refused(bool accepted, const char* message, const char* what) {
    char quoted[64];
    bool printable = !strpbrk(e.text, "\r\n\t\x1b");
    check(!accepted && printable && !strcmp(e.text, message), "%s is refused: %s",
          option_quote(quoted, what), e.text);
}

static void refuse(const char* words, const char* message) { refused(parse(words), message, words); }

static bool value_is(const char* name, const char* expected) {
    char text[OPTION_SIZE];
    options_value(&o, options_find(name), text, sizeof text);
    if (strcmp(text, expected)) printf("     %s is %s, not %s\n", name, text, expected);
    return !strcmp(text, expected);
}

// ------------------------------------------------------------------------------------------------

static void test_defaults(void) {
    static const char* const standard[][2] = {
        {"model", "tiny"}, {"vocab", "0"}, {"residual", "mhc"}, {"streams", "4"}, {"sinkhorn-iters", "20"},
        {"sinkhorn-order", "cr"}, {"hc-maps", "pre,post,res"}, {"hc-static", "false"}, {"hc-gap", "4"},
        {"data", ""}, {"micro-batches", "1"}, {"lr", "0.001"}, {"warmup", "100"}, {"schedule", "cosine"},
        {"min-lr-frac", "0.1"}, {"weight-decay", "0.1"}, {"beta1", "0.9"}, {"beta2", "0.95"},
        {"eps", "1e-08"}, {"grad-clip", "1"}, {"seed", "1337"}, {"on-spike", "ignore"}, {"recompute", "0"},
        {"plan", "false"},
        {"out", "out"}, {"keep", "3"}, {"generate", ""}, {"resume", "false"},
    };
    check(parse("") && options_check(&o, &e), "no options are good options");
    for (size_t k = 0; k < sizeof standard / sizeof *standard; k++)
        check(value_is(standard[k][0], standard[k][1]), "default of %s", standard[k][0]);
    bool any = false;
    for (int row = 0; row < options_count(); row++) any = any || options_given(&given, options_name(row));
    check(!any, "nothing counts as given");
    check(o.layers > 0 && o.width > 0 && o.heads > 0 && o.seq > 0, "the default model has a shape");
}

static void test_forms(void) {
    check(parse("--lr|2e-4|--steps=7|--plan|--out=a=b") && o.lr == 2e-4 && o.steps == 7 && o.plan
          && !strcmp(o.out, "a=b"), "--name value, --name=value, bare switch, = inside a value");
    check(options_given(&given, "lr") && options_given(&given, "plan") && !options_given(&given, "seed"),
          "given options are known");
    check(parse("--plan=false|--overwrite=true") && !o.plan && o.overwrite, "--switch=false, --switch=true");
    check(parse("--generate=--x") && !strcmp(o.generate, "--x"), "a value may start with -- after =");
    check(parse("--generate|a\nb") && !strcmp(o.generate, "a\nb"), "a prompt may have lines");
    check(parse("--lr=-0.0e0") == false && parse("--grad-clip|+1.5E0") && o.grad_clip == 1.5,
        "signs, exponents");
    check(parse("--recompute|auto") && o.recompute == RECOMPUTE_AUTO && parse("--recompute=3")
        && o.recompute == 3,
          "--recompute auto and 3");
    check(parse("--batch|auto") && o.batch == BATCH_AUTO && value_is("batch", "auto"), "--batch auto");
}

// Every word of every choice, against the enumeration that the code uses.
static void test_choices(void) {
    check(parse("--residual=none") && o.residual == RESIDUAL_NONE && parse("--residual=plain")
          && o.residual == RESIDUAL_PLAIN && parse("--residual=hc") && o.residual == RESIDUAL_HC
          && parse("--residual=mhc") && o.residual == RESIDUAL_MHC && parse("--residual=ihc")
          && o.residual == RESIDUAL_IHC, "--residual");
    check(parse("--sinkhorn-order=cr") && o.sinkhorn_order == ORDER_CR && parse("--sinkhorn-order=rc")
          && o.sinkhorn_order == ORDER_RC && parse("--sinkhorn-order=c") && o.sinkhorn_order == ORDER_C
          && parse("--sinkhorn-order=r") && o.sinkhorn_order == ORDER_R && parse("--sinkhorn-order=none")
          && o.sinkhorn_order == ORDER_NONE, "--sinkhorn-order");
    check(parse("--schedule=cosine") && o.schedule == SCHEDULE_COSINE && parse("--schedule=wsd")
          && o.schedule == SCHEDULE_WSD && parse("--schedule=linear") && o.schedule == SCHEDULE_LINEAR
          && parse("--schedule=step") && o.schedule == SCHEDULE_STEP && parse("--schedule=constant")
          && o.schedule == SCHEDULE_CONSTANT, "--schedule");
    check(parse("--on-spike=stop") && o.on_spike == SPIKE_STOP && parse("--on-spike=skip")
          && o.on_spike == SPIKE_SKIP && parse("--on-spike=ignore") && o.on_spike == SPIKE_IGNORE,
              "--on-spike");
    check(parse("--kernels=plain") && o.kernels == KERNELS_PLAIN && parse("--kernels=fused")
          && o.kernels == KERNELS_FUSED, "--kernels");
    check(parse("--hc-maps=none") && o.hc_maps == 0 && parse("--hc-maps=post") && o.hc_maps == MAP_POST
          && parse("--hc-maps=res,pre") && o.hc_maps == (MAP_PRE | MAP_RES)
          && value_is("hc-maps", "pre,res"), "--hc-maps");
}

static void test_shape(const char* words, long layers, long width, long heads, long seq) {
    check(parse(words) && o.layers == layers && o.width == width && o.heads == heads && o.seq == seq
          && o.vocab == 0 && options_check(&o, &e), "%s is %ld/%ld/%ld/%ld", words, layers, width, heads,
              seq);
}

static void test_models(void) {
    test_shape("--model=gpt2", 12, 768, 12, 1024);
    test_shape("--model=gpt2-medium", 24, 1024, 16, 1024);
    test_shape("--model=gpt2-large", 36, 1280, 20, 1024);
    test_shape("--model=gpt2-xl", 48, 1600, 25, 1024);
    test_shape("--model=d1", 1, 64, 1, 1024);
    test_shape("--model=d12", 12, 768, 12, 1024);
    test_shape("--seq=64|--model=d6|--layers|2", 2, 384, 6, 64);
    static const char* const wrong[] = {"d", "d0", "d01", "d1000", "dL", "d12x", "gpt", "gpt2-", "Tiny",
        "d-1"};
    for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
        char words[32];
        snprintf(words, sizeof words, "--model=%s", wrong[k]);
        check(!parse(words), "%s is refused: %s", words, e.text);
    }
}

static void test_bad_values(void) {
    refuse("--lr|1e-3x", "--lr: found \"1e-3x\", expected a number > 0, as in --lr 1e-3");
    refuse("--lr|0", "--lr: found \"0\", expected a number > 0, as in --lr 1e-3");
    refuse("--lr", "--lr: found nothing, expected a number > 0, as in --lr 1e-3");
    refuse("--lr|", "--lr: found nothing, expected a number > 0, as in --lr 1e-3");
    refuse("--lr=", "--lr: found nothing, expected a number > 0, as in --lr 1e-3");
    refuse("--lr|--steps|5", "--lr: found \"--steps\", expected a number > 0, as in --lr 1e-3");
    refuse("--keep|-1", "--keep: found \"-1\", expected a whole number 0 to 99999999, as in --keep 3");
    refuse("--layers|x", "--layers: found \"x\", expected a whole number 1 to 10000");
    refuse("--recompute=Auto", "--recompute: found \"Auto\", expected auto or a whole number 0 to 20000,"
           " as in --recompute 0");
    refuse("--schedule|cos", "--schedule: found \"cos\", expected one of cosine|wsd|linear|step|constant,"
           " as in --schedule cosine");
    refuse("--plan=yes", "--plan: found \"yes\", expected true or false");
    refuse("--out=a\x1b[1m\n",
        "--out: found \"a?[1m?\", expected a path of 1 to 4095 printable bytes, as in --out out");
    refuse("--data=", "--data: found nothing, expected a path of 1 to 4095 printable bytes");
    refuse("--generate=", "--generate: found nothing, expected 1 to 4095 bytes of text");
    refuse("--generate", "--generate: found nothing, expected 1 to 4095 bytes of text");
    refuse("--lr|1|--lr=1", "--lr: found twice, expected once, remove one");
    refuse("--plan|--plan", "--plan: found twice, expected once, remove one");
    refuse("foo", "command line: found \"foo\", expected --name value, --name=value or --switch");
    refuse("-b|4", "command line: found \"-b\", expected --name value, --name=value or --switch");
    refuse("--", "command line: found \"--\", expected --name value, --name=value or --switch");
    refuse("--plan|false", "command line: found \"false\", expected --name value, --name=value or --switch");
    static const char* const wrong[] = {
        "--lr=nan",
        "--lr=inf",
        "--lr=-1",
        "--lr=1e999",
        "--lr=1e-999",
        "--lr=1e31",
        "--lr=0x1p-3",
        "--lr= 1",
        "--lr=1 ",
        "--lr=1,5",
        "--lr=1e",
        "--lr=.",
        "--lr=--1",
        "--beta1=1",
        "--beta2=-0.1",
        "--min-lr-frac=1.1",
        "--eps=0",
        "--grad-clip=-1",
        "--hc-gap=-1",
        "--weight-decay=-0.1",
        "--temperature=-1",
        "--temperature=nan",
        "--steps=-1",
        "--steps=1e3",
        "--steps=10K",
        "--steps=1.0",
        "--steps=+1",
        "--steps= 1",
        "--steps=0x10",
        "--steps=100000000",
        "--seed=9223372036854775808",
        "--seed=-1",
        "--streams=0",
        "--streams=9",
        "--grad-clip=1e-999",
        "--out|--plan",
        "--sinkhorn-iters=0",
        "--sinkhorn-iters=101",
        "--log-every=0",
        "--batch=0",
        "--micro-batches=0",
        "--top-k=-1",
        "--keep=-1",
        "--recompute=-1",
        "--recompute=",
        "--data=\x7f",
        "--vocab=-1",
        "--heads=0",
        "--hc-maps=",
        "--hc-maps=pre,",
        "--hc-maps=,pre",
        "--hc-maps=pre,pre",
        "--hc-maps=pre,none",
        "--hc-maps=prepost",
        "--residual=",
        "--residual=m",
        "--residual=MHC",
        "--residual=none|plain",
        "--plan=",
        "--plan=1",
        "--model=",
        "--=1",
        "--on-spike=stop,skip",
    };
    for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++)
        check(!parse(wrong[k]) && e.text[0], "%s is refused: %s", wrong[k], e.text);
    check(parse("--seed=9223372036854775807") && o.seed == LONG_MAX && parse("--sinkhorn-iters=1")
          && parse("--beta1=0") && parse("--top-k=0") && parse("--steps=0") && parse("--streams=8"),
              "limits are good");
}

// A refused value leaves the old one; a value as long as the field fits, one byte more does not.
static void test_lengths(void) {
    static char text[OPTION_SIZE + 1];
    memset(text, 'a', OPTION_SIZE - 1);
    check(parse("") && options_set(&o, "out", text, "", &e) && !strcmp(o.out, text), "the longest path");
    text[OPTION_SIZE - 1] = 'a';
    refused(options_set(&o, "out", text, "m.safetensors", &e), "m.safetensors: --out: found"
            " \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...\", expected a path of 1 to 4095"
            " printable bytes, as in --out out", "a path that is too long");
    check(strlen(o.out) == OPTION_SIZE - 1, "and the old one stays");
    check(!options_set(&o, "lr", "-1", "", &e) && o.lr == 1e-3, "a wrong number leaves the old one");
    check(!options_set(&o, text, "1", "", &e), "a name that is too long: %s", e.text);
}

static void test_unknown(void) {
    refuse("--stpes|5",
        "found the unknown option \"stpes\", expected one of --help, the nearest is --steps");
    refuse("--micro_batches=5", "found the unknown option \"micro_batches\", expected one of --help,"
           " the nearest is --micro-batches");
    refuse("--learning-rat\n|5", "found the unknown option \"learning-rat?\", expected one of --help,"
           " the nearest is --generate");
    check(option_distance("", "abc") == 3 && option_distance("abc", "") == 3
          && option_distance("flaw", "lawn") == 2 && option_distance("kitten", "sitting") == 3
          && option_distance("steps", "steps") == 0,
          "edit distance");
    for (int row = 0; row < options_count(); row++) {       // one letter lost: the nearest is still this one
        char words[64], expected[64];
        snprintf(words, sizeof words, "--%s=1", options_name(row));
        memmove(words + 3, words + 4, strlen(words + 4) + 1);
        snprintf(expected, sizeof expected, "nearest is --%s", options_name(row));
        if (strlen(options_name(row)) > 4)
            check(!parse(words) && strstr(e.text, expected), "%s: %s", words, e.text);
    }
}

// ------------------------------------------------------------------------------------------------

static bool config(const char* text, size_t size) {
    options_defaults(&o);
    memset(&given, 0, sizeof given);
    memset(&e, 0, sizeof e);
    return options_parse_config_text(&o, &given, text, size, "run.cfg", &e);
}

static void refuse_config(const char* text, const char* message) {
    refused(config(text, strlen(text)), message, "a configuration file");
}

static void test_config_text(void) {
    static const char good[] = "# a comment\n\n  lr =2e-4 # peak\r\nsteps=9\n\tplan = true\nout = a#b c\n"
                               "#seed = 1\ngenerate = x = y\ndata=#d";
    check(config(good, sizeof good - 1) && o.lr == 2e-4 && o.steps == 9 && o.plan && !strcmp(o.out, "a#b c")
          && o.seed == 1337 && !strcmp(o.generate, "x = y") && !strcmp(o.data, "#d"),
              "comments, blanks, CR, last line");
    check(options_given(&given, "lr") && !options_given(&given, "seed"),
        "given in the file counts as given");
    check(config("", 0) && config("steps = 12", 9) && o.steps == 1, "the size counts, not a zero byte");
    refuse_config("lr = 1\nsteps = 2\nlr = 1\n", "run.cfg:3: --lr: found twice, expected once, remove one");
    refuse_config("\nlr = 1x\n", "run.cfg:2: --lr: found \"1x\", expected a number > 0, as in --lr 1e-3");
    refuse_config("lr =\n", "run.cfg:1: --lr: found nothing, expected a number > 0, as in --lr 1e-3");
    refuse_config("lr = # 1\n", "run.cfg:1: --lr: found nothing, expected a number > 0, as in --lr 1e-3");
    refuse_config("plan\n", "run.cfg:1: found \"plan\", expected name = value, as in lr = 1e-3");
    refuse_config("lr 1\n", "run.cfg:1: found \"lr 1\", expected name = value, as in lr = 1e-3");
    refuse_config("lrr = 1\n", "run.cfg:1: found the unknown option \"lrr\", expected one of --help,"
                  " the nearest is --lr");
    refuse_config("config = x\n",
        "run.cfg:1: --config: found in a file, expected on the command line alone");
    check(!config("lr\0 = 1\n", 8) && strstr(e.text, "run.cfg:1: found a zero byte"), "a zero byte: %s",
        e.text);
    static char line[2 * OPTION_SIZE];
    memset(line, 'x', sizeof line);
    check(!config(line, sizeof line) && strstr(e.text, "run.cfg:1: found"), "a line that is too long: %s",
        e.text);
}

static void test_config_file(void) {
    char folder[] = "/tmp/test_options_XXXXXX", path[64], words[256];
    if (!check(mkdtemp(folder) != NULL, "a temporary directory")) return;
    snprintf(path, sizeof path, "%s/run.cfg", folder);
    FILE* file = fopen(path, "wb");
    if (!check(file != NULL, "a file in it")) return;
    fputs("lr = 5e-4\nsteps = 50\nmodel = d2\n", file);
    fclose(file);
    snprintf(words, sizeof words, "--config|%s", path);
    check(parse(words) && o.lr == 5e-4 && o.steps == 50 && o.width == 128 && o.layers == 2, "--config FILE");
    snprintf(words, sizeof words, "--steps|60|--config=%s|--model|d3", path);
    check(parse(words) && o.lr == 5e-4 && o.steps == 60 && o.layers == 3,
        "the command line overrides it, before and after");
    snprintf(words, sizeof words, "--config=%s|--config=%s", path, path);
    refuse(words, "--config: found twice, expected once, remove one");
    file = fopen(path, "wb");
    if (!check(file != NULL, "written again")) return;
    fputs("lr = 1x\n", file);
    fclose(file);
    snprintf(words, sizeof words, "--lr=1|--config=%s", path);
    check(!parse(words) && strstr(e.text, "/run.cfg:1: --lr: found \"1x\""),
        "what is overridden is still checked");
    file = fopen(path, "wb");
    for (int k = 0; file && k < 65536; k++) fputc('\n', file);
    if (file) fclose(file);
    check(!parse(words) && strstr(e.text, "found 65536 bytes or more"), "a huge file: %s", e.text);
    unlink(path);
    check(!parse(words) && strstr(e.text, "No such file"), "a missing file: %s", e.text);
    snprintf(words, sizeof words, "--config=%s", folder);
    check(!parse(words) && strstr(e.text, "Is a directory"), "a directory: %s", e.text);
    rmdir(folder);
}

// ------------------------------------------------------------------------------------------------

// A value other than the default, for every kind of row.
static const char* other_value(const OptionRow* row) {
    switch (row->kind) {
    case KIND_COUNT: return "7";
    case KIND_AUTO: return "auto";
    case KIND_NUMBER: return row->limits[0] == '>' ? "0.30000000000000004" : "0.123456789012345678";
    case KIND_SWITCH: return "true";
    case KIND_CHOICE: return strrchr(row->limits, '|') + 1;
    case KIND_MAPS: return "post,res";
    case KIND_MODEL: return "gpt2-large";
    case KIND_PATH: return "a b/*.bin=#";
    case KIND_TEXT: return "two\nlines, \"quoted\" \xc3\xa9";
    }
    return "";
}

static void test_round_trip(void) {
    char text[OPTION_SIZE], back[OPTION_SIZE], quoted[64];
    for (int row = 0; row < options_count(); row++) {
        const OptionRow* r = &option_rows[row];
        static Options copy;
        for (int other = 0; other < 2; other++) {
            bool good = parse("") && (!other || options_set(&o, r->name, other_value(r), "", &e));
            options_value(&o, row, text, sizeof text);
            memset(&copy, 0, sizeof copy);
            good = good && options_set(&copy, r->name, text, "", &e);
            options_value(&copy, row, back, sizeof back);
            good = good && !strcmp(text, back)
                   && !memcmp((char*)&o + r->offset, (char*)&copy + r->offset,
                   r->kind < KIND_MODEL ? r->size : 1);
            if (other && strcmp(r->name, "on-spike")) {         // whose last word is its default
                Options first;
                options_defaults(&first);
                options_value(&first, row, back, sizeof back);
                good = good && strcmp(text, back);
            }
            check(good, "%s = %s there and back", r->name, option_quote(quoted, text));
        }
    }
}

static void test_table(void) {
    for (int row = 0; row < options_count(); row++) {
        const OptionRow* r = &option_rows[row];
        bool alone = true, sized = r->kind == KIND_CHOICE || r->kind == KIND_MAPS ? r->size == sizeof(int)
                                 : r->kind == KIND_SWITCH ? r->size == sizeof(bool)
                                 : r->kind == KIND_NUMBER ? r->size == sizeof(double)
                                 : r->kind <= KIND_AUTO ? r->size == sizeof(long) : r->size >= 64;
        for (int k = 0; k < options_count(); k++)
            if (k != row && (!strcmp(options_name(k), r->name) || option_rows[k].offset == r->offset))
                alone = false;
        check(sized && alone && r->size <= OPTION_SIZE && strlen(r->name) < 32, "row of %s", r->name);
    }
}

static void test_help(void) {
    static char text[65536];
    FILE* file = tmpfile();
    if (!check(file != NULL, "a temporary file")) return;
    options_help(file, "train");
    rewind(file);
    size_t size = fread(text, 1, sizeof text - 1, file), widest = 0;
    fclose(file);
    text[size] = 0;
    for (const char* line = text; *line; line += strcspn(line, "\n") + 1)
        if (strcspn(line, "\n") > widest) widest = strcspn(line, "\n");
    check(widest < 110 && widest > 80, "the widest line of help has %zu columns", widest);
    for (int row = 0; row < options_count(); row++) {
        char start[64], standard[64];
        int found = 0;
        snprintf(start, sizeof start, "\n  --%s ", options_name(row));
        snprintf(standard, sizeof standard, "(default %s", option_rows[row].standard);
        const char* line = strstr(text, start);
        for (const char* next = line; next; next = strstr(next + 1, start)) found++;
        check(found == 1 && strstr(line, "(default ") && strstr(line, standard), "help on %s, once",
            options_name(row));
    }
}

static void test_stored(void) {
    static const char* const stored[] =
        {"model", "layers", "hc-gap", "data", "tokenizer", "batch", "micro-batches", "steps", "lr", "seed"};
    static const char* const passing[] =
        {"on-spike", "recompute", "plan", "out", "keep", "generate", "config"};
    for (size_t k = 0; k < sizeof stored / sizeof *stored; k++)
        check(options_stored(options_find(stored[k])), "checkpoints keep %s", stored[k]);
    for (size_t k = 0; k < sizeof passing / sizeof *passing; k++)
        check(!options_stored(options_find(passing[k])), "and not %s", passing[k]);
}

static void test_restore(void) {
    const char* where = "out/step_00000005.safetensors";
    check(parse("--lr|1e-3|--steps|90") && options_restore(&o, &given, "width", "192", where, &e)
        && o.width == 192,
          "what is not given comes from the checkpoint");
    check(options_restore(&o, &given, "lr", "0.001", where, &e),
        "given with the same value, otherwise written");
    check(options_restore(&o, &given, "steps", "50", where, &e) && o.steps == 90, "--steps may differ");
    check(options_restore(&o, &given, "out", "elsewhere", where, &e) && !strcmp(o.out, "out"),
        "--out is not restored");
    refused(options_restore(&o, &given, "lr", "0.002", where, &e),
        "--lr: found \"0.001\", expected \"0.002\" as in"
            " out/step_00000005.safetensors, leave it out or choose another --out", "another value");
    refused(options_restore(&o, &given, "width", "x", where, &e),
        "out/step_00000005.safetensors: --width: found \"x\","
            " expected a whole number 1 to 1000000", "a spoilt checkpoint");
    check(!options_restore(&o, &given, "depth", "1", where, &e), "an option of another version: %s", e.text);
    check(parse("--batch|auto") && options_restore(&o, &given, "batch", "13", where, &e) && o.batch == 13,
          "--batch auto is what it was");
}

// Each is parsed well and refused for what it means together with the others.
static void test_check(const char* words, const char* message) {
    bool parsed = parse(words);
    check(parsed, "%s can be read", words);
    refused(options_check(&o, &e), message, words);
}

static void test_checks(void) {
    test_check("--width=128|--heads|5",
        "--heads: found 5, expected a divisor of the width, 128, change --heads or"
               " --width");
    test_check("--resume|--overwrite",
        "--resume: found --overwrite too, expected one of them, remove the other");
    test_check("--eval|--generate|x",
        "--generate: found --eval too, expected one mode a run, remove the other");
    test_check("--generate|x|--dump|y",
        "--generate: found --dump too, expected one mode a run, remove the other");
    test_check("--eval|--dump|y", "--eval: found --dump too, expected one mode a run, remove the other");
    test_check("--layers=4|--width=1000000|--heads=1",
        "--model: found 4.8e+13 parameters, expected at most 2^40, reduce"
               " --layers or --width");
    test_check("--layers=4|--heads=4|--batch=1000000|--seq=1000000",
        "--batch: found 1.6e+19 activations, expected at most 2^50, reduce"
               " --batch or --seq");
    test_check("--seq=128|--batch=1000|--micro-batches=1000000",
        "--micro-batches: found 1.28e+11 tokens a step, expected at"
               " most 2^32, reduce it");
    check(parse("--generate|x|--plan") && options_check(&o, &e) && parse("--resume|--eval")
        && options_check(&o, &e)
          && parse("--warmup=2000|--steps=10") && options_check(&o, &e), "what may stand together");
    check(parse("--model=gpt2-xl|--vocab=50257|--residual=plain|--streams=1") && options_check(&o, &e)
          && fabs(options_parameters(&o) - 1.5576e9) < 2e6, "GPT-2 XL has 1.56e9 parameters, %.5g here",
          options_parameters(&o));
}

int main(void) {
    test_table();
    test_defaults();
    test_forms();
    test_choices();
    test_models();
    test_bad_values();
    test_lengths();
    test_unknown();
    test_config_text();
    test_config_file();
    test_round_trip();
    test_help();
    test_stored();
    test_restore();
    test_checks();
    return check_summary();
}
