// test_corpus.c: stories are parsed back to the choices that made them, choices are as likely as they claim.
//
// The parser is the generator's own walk with another decider. It follows a script of choices, goes on with
// the first alternative where the script ends, and is thrown back by longjmp as soon as its text leaves the
// expected one. Counting the script up like an odometer visits every way to write the text.

#include <setjmp.h>
#include "corpus.h"
#include "../host/check.h"

enum { MAX_SCRIPT = 1024, MAX_KINDS = 1 << 17, SMALL = 16, LONGEST = 1 << 14 };

// ------------------------------------------------------------------------------------------------
// The parser

typedef struct { int choice, count, weights[CORPUS_MAX_CHOICES]; } Decision;

static Decision script[MAX_SCRIPT];
static int script_length, script_position;
static const char* expected;
static size_t expected_length, agreed;
static jmp_buf dead_end;

static void require_agreement(const CorpusWalk* w) {
    if (w->length > expected_length || memcmp(w->text + agreed, expected + agreed, w->length - agreed))
        longjmp(dead_end, 1);
    agreed = w->length;
}

static int next_possible(const Decision* d, int k) {
    while (k < d->count && !d->weights[k]) k++;
    return k;
}

static int decide_by_script(CorpusWalk* w, const int* weights, int count, int total) {
    (void)total;
    require_agreement(w);
    if (script_position == MAX_SCRIPT) die("a story has more than %d choices", MAX_SCRIPT);
    Decision* d = &script[script_position];
    if (script_position++ == script_length) {
        script_length++;
        d->count = count;
        memcpy(d->weights, weights, (size_t)count * sizeof(int));
        d->choice = next_possible(d, 0);
    }
    return d->choice;
}

// To the next script that is not a continuation of this one; false after the last.
static bool next_script(void) {
    for (script_length = script_position; script_length; script_length--) {
        Decision* d = &script[script_length - 1];
        d->choice = next_possible(d, d->choice + 1);
        if (d->choice < d->count) return true;
    }
    return false;
}

// Number of ways to write exactly this text as one story; nats (length) are those of the last way found.
static int count_parses(const char* story, size_t length, float* nats) {
    static char text[LONGEST];
    static float booked[LONGEST];
    static CorpusWalk walk;
    volatile int parses = 0;
    expected = story;
    expected_length = length;
    script_length = 0;
    do {
        memset(&walk, 0, sizeof walk);
        memset(booked, 0, length * sizeof(float));
        walk.text = text;
        walk.nats = booked;
        walk.capacity = LONGEST;
        walk.decide = decide_by_script;
        script_position = 0;
        agreed = 0;
        if (setjmp(dead_end)) continue;
        corpus_story(&walk);
        require_agreement(&walk);
        if (walk.length != length) continue;
        parses++;
        memcpy(nats, booked, length * sizeof(float));
    } while (next_script());
    return parses;
}

static size_t story_length(const char* text) { return (size_t)(strstr(text, "\n\n") - text) + 2; }

static void test_parse(void) {
    enum { BYTES = 300000, STORIES = 220 };
    char* text = (char*)allocate(BYTES + 1, 1);
    float* nats = (float*)allocate(BYTES, sizeof(float));
    float parsed[LONGEST];
    int unique = 0, same = 0, other = 0;
    size_t at = 0, shortest = BYTES, longest = 0;
    corpus_generate(text, nats, BYTES, 5);
    for (int k = 0; k < STORIES; k++) {
        size_t length = story_length(text + at);
        if (length < shortest) shortest = length;
        if (length > longest) longest = length;
        int parses = count_parses(text + at, length, parsed);
        if (parses != 1) printf("     %d parses of: %.*s", parses, (int)length, text + at);
        unique += parses == 1;
        same += parses == 1 && !memcmp(parsed, nats + at, length * sizeof(float));
        text[at + length / 2] ^= 1;
        other += count_parses(text + at, length, parsed) == 0;
        at += length;
    }
    check(unique == STORIES, "%d of %d stories have exactly one parse (%zu to %zu bytes)", unique, STORIES,
          shortest, longest);
    check(same == STORIES, "%d of %d parses book the same numbers at the same bytes", same, STORIES);
    check(other == STORIES, "%d of %d stories have no parse with one letter changed", other, STORIES);
    free(text);
    free(nats);
}

// ------------------------------------------------------------------------------------------------
// The generator

static void test_lengths(void) {
    enum { BYTES = 3000 };
    static char whole[BYTES], part[BYTES + 1];
    static float whole_nats[BYTES], part_nats[BYTES + 1];
    bool prefix = true, inside = true, silent = true;
    corpus_generate(whole, whole_nats, BYTES, 9);
    for (size_t n = 0; n <= BYTES; n += n < 700 ? 1 : 97) {
        part[n] = '#';
        part_nats[n] = -1;
        corpus_generate(part, part_nats, n, 9);
        prefix = prefix && !memcmp(part, whole, n) && !memcmp(part_nats, whole_nats, n * sizeof(float));
        inside = inside && part[n] == '#' && part_nats[n] == -1;
        corpus_generate(part, NULL, n, 9);
        silent = silent && !memcmp(part, whole, n) && part[n] == '#';
    }
    check(prefix, "any length 0, 1, 2, .. is a prefix of the longer text, and so are its numbers");
    check(inside, "nothing is written past the length");
    check(silent, "the text is the same without numbers");
}

static uint64_t text_hash(const char* text, size_t bytes) {
    uint64_t h = bytes;
    for (size_t k = 0; k < bytes; k++) h = hash64(h, (unsigned char)text[k]);
    return h;
}

static void test_text(void) {
    enum { BYTES = 1 << 20 };
    char* text = (char*)allocate(BYTES, 1);
    char* other = (char*)allocate(BYTES, 1);
    float* nats = (float*)allocate(BYTES, sizeof(float));
    bool ascii = true, possible = true, spaced = true;
    double sum = 0;
    size_t equal = 0, stories = 0;
    corpus_generate(other, NULL, BYTES, 2);
    corpus_generate(text, nats, BYTES, 1);
    for (size_t k = 0; k < BYTES; k++) {
        ascii = ascii && (text[k] == '\n' || (text[k] >= ' ' && text[k] <= '~'));
        possible = possible && nats[k] >= 0 && nats[k] < 100;
        spaced = spaced && !(k && text[k] == ' ' && strchr(" \n", text[k - 1]));
        stories += k && text[k] == '\n' && text[k - 1] == '\n';
        equal += text[k] == other[k];
        sum += (double)nats[k];
    }
    uint64_t hash = text_hash(text, BYTES);
    check(ascii, "printable ASCII and newlines only");
    check(spaced, "no two blanks in a row");
    check(possible, "every number is at least 0");
    check(sum / BYTES > 0.1 && sum / BYTES < 0.5, "%.4f nats per byte, %.0f bytes a story", sum / BYTES,
          (double)BYTES / (double)stories);
    check(equal < BYTES / 4, "another seed gives another text (%.1f %% of the bytes agree)",
          100.0 * (double)equal / BYTES);
    check(hash == 0x73c0cbe47f52245d, "the text of seed 1 is what it always was (hash 0x%016llx)",
          (unsigned long long)hash);
    free(text);
    free(other);
    free(nats);
}

// ------------------------------------------------------------------------------------------------
// Frequencies. A kind of choice is its list of weights; its counts are compared with what the weights say.
// Choices between events have too many kinds: there the mean of -ln p is compared with the expected entropy.

typedef struct { int count, total, weights[SMALL]; uint64_t key; double seen[SMALL]; } Kind;

static Kind* kinds;
static int kind_count;
static double surprise[2], variance[2]; // of words, of events: sum of -ln p less its mean, its variance
static double information;              // sum of -ln p of the choices that show in the text

static Kind* find_kind(const int* weights, int count, int total) {
    uint64_t key = (uint64_t)count;
    for (int k = 0; k < count; k++) key = hash64(key, (uint64_t)weights[k]);
    size_t at = key % MAX_KINDS;
    while (kinds[at].count && kinds[at].key != key) at = (at + 1) % MAX_KINDS;
    Kind* kind = &kinds[at];
    if (!kind->count) {
        if (++kind_count == MAX_KINDS / 2) die("more than %d kinds of choice", MAX_KINDS / 2);
        kind->count = count;
        kind->total = total;
        kind->key = key;
        memcpy(kind->weights, weights, (size_t)count * sizeof(int));
    }
    return kind;
}

static int decide_and_count(CorpusWalk* w, const int* weights, int count, int total) {
    int chosen = corpus_draw(w, weights, count, total);
    double mean = 0, square = 0;
    for (int k = 0; k < count; k++) {
        if (!weights[k]) continue;
        double p = (double)weights[k] / total;
        mean -= p * log(p);
        square += p * log(p) * log(p);
    }
    if (w->length < w->capacity) information -= log((double)weights[chosen] / total);
    surprise[count > SMALL] += -log((double)weights[chosen] / total) - mean;
    variance[count > SMALL] += square - mean * mean;
    if (count <= SMALL) find_kind(weights, count, total)->seen[chosen]++;
    return chosen;
}

// The t for which exp(-t) bounds the chance of such a Pearson statistic (Laurent and Massart: a chi-square of
// d degrees of freedom is above d + 2 sqrt(d t) + 2 t with at most that chance); 0 where a cell is small.
static double unlikeliness(const Kind* kind) {
    double trials = 0, statistic = 0, d = -1;
    for (int k = 0; k < kind->count; k++) trials += kind->seen[k];
    for (int k = 0; k < kind->count; k++) {
        double expectation = trials * kind->weights[k] / kind->total;
        if (!kind->weights[k]) continue;
        if (expectation < 20) return 0;
        d++;
        statistic += (kind->seen[k] - expectation) * (kind->seen[k] - expectation) / expectation;
    }
    if (!(statistic > d)) return 0;
    double root = (sqrt(2 * statistic - d) - sqrt(d)) / 2;
    return root * root;
}

// Bounds with about one chance in a million: exp(-19) for each of some hundred kinds, 5 sigma for a mean.
static void test_frequencies(void) {
    enum { BYTES = 4 << 20 };
    CorpusWalk walk;
    memset(&walk, 0, sizeof walk);
    walk.text = (char*)allocate(BYTES, 1);
    walk.nats = (float*)allocate(BYTES, sizeof(float));
    walk.capacity = BYTES;
    walk.decide = decide_and_count;
    walk.seed = 3;
    kinds = (Kind*)allocate(MAX_KINDS, sizeof(Kind));
    while (walk.length < BYTES) corpus_story(&walk);

    double booked = 0, worst = 0;
    int judged = 0;
    for (size_t k = 0; k < BYTES; k++) booked += (double)walk.nats[k];
    for (int k = 0; k < MAX_KINDS; k++) {
        double t = kinds[k].count ? unlikeliness(&kinds[k]) : 0;
        judged += t > 0;
        if (!(t <= worst)) worst = t;
    }
    check(fabs(booked - information) <= 1e-6 * information, "%.0f nats are booked, %.0f were chosen", booked,
          information);
    check(judged > 30 && worst <= 19, "counts of %d kinds of choice: the chance of the worst is exp(-%.1f)",
          judged, worst);
    for (int k = 0; k < 2; k++) {
        double z = surprise[k] / sqrt(variance[k]);
        check(fabs(z) <= 5, "the mean -ln p of %s is %.2f sigma from its entropy", k ? "events" : "words", z);
    }
    free(walk.text);
    free(walk.nats);
    free(kinds);
}

int main(void) {
    test_parse();
    test_lengths();
    test_text();
    test_frequencies();
    return check_summary();
}
