// corpus.h: the built-in training text, short stories whose information content is known exactly.
//
// A story is a walk through a small world: two children, their things, an animal with a riddle, places. Each
// step picks an event that fits the state (who is where, who has what, what was asked or promised), tells it
// through a template and changes the state. So a model that remembers predicts better.
//
// Every choice goes through corpus_choose, which books -ln p. No story can be written in two ways (the test
// parses stories back and counts the ways), so the sum of what is booked is the text's information, and its
// mean is the loss of a perfect model that sees each story from its beginning.
//
// Templates: [a|b|3c] is a choice, a leading digit its weight; $ and a letter is a slot, filled from state.
//   children  $x actor: name, or he/she if the last subject was the actor too   $n name   $c girl or boy
//             $h his, her   $y $Y the other child as object, as subject   $N its name
//   things    $a a new one, given to the actor: "an old key"   $t "the key" or "the old key"   $b "key"
//             $u what one does with it   $v what the other has   $i $I a new spot, its spot: "in the grass"
//   places    $l $L a home for the actor: "on the hill", "the hill"   $g one to go to   $w ", where Ben was"
//             $p where the actor is   $q $Q where the thing lies   $o the other's   $e where the animal is
//   the rest  $Z a new animal, $z the animal   $r its riddle, $A the answer, $B a wrong one
//             $d $D a new day, the day   and the letters of corpus_phrases
// The first letter of a sentence becomes a capital by itself.

#ifndef DATA_CORPUS_H
#define DATA_CORPUS_H

#include <assert.h>
#include <ctype.h>
#include <math.h>
#include <string.h>
#include "../host/common.h"

// ------------------------------------------------------------------------------------------------
// Words. Earlier ones of a list are drawn more often.

enum { CORPUS_NAMES = 20, CORPUS_PLACES = 16, CORPUS_THINGS = 16, CORPUS_LOOKS = 14, CORPUS_ANIMALS = 10,
       CORPUS_SPOTS = 6, CORPUS_DAYS = 5, CORPUS_RIDDLES = 10, CORPUS_MAX_CHOICES = 320 };

static const char* const corpus_names[CORPUS_NAMES] = {     // girls, then boys
    "Anna", "Mira", "Lily", "Rosa", "Nora", "Ella", "Clara", "Ida", "Sophie", "Judith",
    "Tom", "Ben", "Jack", "Sam", "Max", "Hugo", "Peter", "Oscar", "David", "Felix"};

static const struct { const char* at; const char* noun; } corpus_places[CORPUS_PLACES] = {
    {"by", "river"}, {"in", "forest"}, {"at", "mill"}, {"on", "hill"}, {"at", "market"}, {"in", "garden"},
    {"by", "lake"}, {"at", "harbour"}, {"on", "bridge"}, {"in", "barn"}, {"by", "well"}, {"in", "tower"},
    {"on", "beach"}, {"in", "cave"}, {"at", "inn"}, {"in", "valley"}};

static const char* const corpus_looks[CORPUS_LOOKS] = {
    "red", "old", "little", "wooden", "silver", "blue", "golden", "heavy", "shiny", "yellow", "strange",
    "green", "broken", "odd"};

static const struct { const char* noun; const char* use; } corpus_things[CORPUS_THINGS] = {
    {"kite", "[flew $t [over the trees|high in the wind]|let $t dance in the [wind|sky]]"},
    {"bell", "rang $t [2once|twice|three times|until everybody came]"},
    {"drum", "[beat|played] $t [so loudly that the birds flew away|softly|all day|until dinner]"},
    {"lamp", "[lit $t and [looked at the shadows|told a story]|cleaned $t until it shone]"},
    {"book", "[read $t [aloud|twice|to the last page]|looked at the pictures in $t]"},
    {"key", "tried $t in [every door|an old lock|a box], but [nothing opened|it did not fit]"},
    {"map", "[looked at $t for a long time|drew a [house|ship|dragon|road] on $t]"},
    {"coin", "[tossed $t in the air|made a wish on $t|counted to ten and hid $t in one hand]"},
    {"hat", "put on $t and [danced|bowed|sang|pulled a funny face]"},
    {"ball", "[threw $t high into the air|kicked $t against the wall|rolled $t down the path]"},
    {"ring", "[turned $t [once|twice] and made a wish|held $t up to the light]"},
    {"flute", "played a [merry|sad|slow|new] [song|tune] on $t"},
    {"boat", "[let $t float in a [puddle|bucket]|made a [new|white] sail for $t]"},
    {"mirror", "looked into $t and [smiled|frowned|combed $h hair]"},
    {"basket", "filled $t with [apples|nuts|flowers|shells|plums]"},
    {"whistle", "blew $t, and [a dog barked|everybody looked up|a bird answered]"}};

static const char* const corpus_animals[CORPUS_ANIMALS] = {
    "owl", "fox", "raven", "toad", "hare", "badger", "goose", "mouse", "hedgehog", "crow"};

static const char* const corpus_spots[CORPUS_SPOTS] = {
    "under a stone", "behind a bush", "in the grass", "in a hole", "under a bench", "between two roots"};

static const char* const corpus_days[CORPUS_DAYS] = {
    "on Sunday", "on Friday", "on Monday", "on Tuesday", "at noon"};

static const struct { const char* question; const char* answer; } corpus_riddles[CORPUS_RIDDLES] = {
    {"What has teeth but cannot bite", "a comb"},
    {"What has hands but cannot clap", "a clock"},
    {"What has an eye but cannot see", "a needle"},
    {"What has a neck but no head", "a bottle"},
    {"What has legs but cannot walk", "a table"},
    {"What has a tongue but cannot talk", "a shoe"},
    {"What has a bed but never sleeps", "a river"},
    {"What has ears but cannot hear", "a field of corn"},
    {"What gets wetter the more it dries", "a towel"},
    {"What is full of holes but holds water", "a sponge"}};

// Phrases that every story needs, and how they vary.
static const struct { char slot; const char* text; } corpus_phrases[] = {
    {'k', "[clever|shy|brave|curious|cheerful|lazy|quiet|proud|merry|stubborn|tall|polite]"},
    {'T', "[4|2then |soon |after a while |a little later |once more |suddenly |before long |again ]"},
    {'W', "[2|the next day |that afternoon |in the evening |early in the morning |later |after lunch ]"},
    {'M', "[walked|ran|2went|hurried|wandered|raced|marched|skipped|strolled|crept]"},
    {'S', "[3said|cried|whispered|called|laughed|murmured|sighed|mumbled|shouted|sang]"},
    {'H', "[4| softly| with a smile| happily| slowly| at once| proudly| sadly| with a nod| quickly]"},
    {'E', "[learned|knew now|saw|felt|never forgot|understood] that"},
    {'P', "[3|cold |dark |quiet |windy |sunny |misty ]"},
    {'!', "[2,|!]"},
    {'j', "[2two|three|four|some|many] [small|white|wild|loud|young|fat|black|brown]"},
    {'J', "[2two|three|four|some|many] [sweet|ripe|sour|big|fresh|warm|dry|cold]"}};

// ------------------------------------------------------------------------------------------------
// The walk: where text goes, who decides, and the state of the world.

enum { CORPUS_ANIMAL = 2, CORPUS_NOBODY = 3 };      // holders of things besides the children 0 and 1

typedef struct { int noun, look, holder, owner, place, spot; } CorpusThing;

typedef struct {
    int x, t;                   // bound by the event being told: the actor and the thing
    int goal, last;             // the place to go to, the last subject
    int name[2], girl[2];       // -1 until drawn
    int place[3];               // of the children and the animal
    unsigned deeds[2], visited;
    CorpusThing things[3];
    int thing_count, told;      // events so far
    int animal, riddle, riddle_for, promise_by, promised, day;  // -1 where there is none
    bool raining, begun, sentence_starts;
} CorpusWorld;

typedef struct CorpusWalk {
    char* text;                 // (capacity): what is beyond is told but not written
    float* nats;                // (capacity) or NULL
    size_t length, capacity;
    int (*decide)(struct CorpusWalk*, const int* weights, int count, int total);    // draws, or parses
    uint64_t seed, counter;
    CorpusWorld world;
} CorpusWalk;

// Index of one of the `count` alternatives with a weight above 0. The only source of information in the text.
static inline int corpus_choose(CorpusWalk* w, const int* weights, int count) {
    int total = 0;
    for (int k = 0; k < count; k++) total += weights[k];
    assert(total > 0);
    int chosen = w->decide(w, weights, count, total);
    if (w->nats && w->length < w->capacity)
        w->nats[w->length] += logf((float)total / (float)weights[chosen]);
    return chosen;
}

// The generator's decider.
static inline int corpus_draw(CorpusWalk* w, const int* weights, int count, int total) {
    (void)count;
    int left = (int)(hash64(w->seed, w->counter++) % (uint64_t)total), k = 0;
    while (left >= weights[k]) left -= weights[k++];
    return k;
}

// One of first .. first + count - 1 that is not in the set `used`; earlier ones are likelier.
static inline int corpus_pick(CorpusWalk* w, int first, int count, unsigned used) {
    int weights[32];
    for (int k = 0; k < count; k++) weights[k] = used >> (first + k) & 1 ? 0 : 2 * count - k;
    return first + corpus_choose(w, weights, count);
}

// One byte of the story, a capital where a sentence starts.
static inline void corpus_put(CorpusWalk* w, char c) {
    CorpusWorld* s = &w->world;
    if (s->sentence_starts) c = (char)toupper((unsigned char)c);
    if (w->length < w->capacity) w->text[w->length] = c;
    w->length++;
    s->sentence_starts = strchr(".!?", c) || (s->sentence_starts && isspace((unsigned char)c));
}

static inline void corpus_write(CorpusWalk* w, const char* text) {
    while (*text) corpus_put(w, *text++);
}

// ------------------------------------------------------------------------------------------------
// Templates

static inline void corpus_slot(CorpusWalk* w, char slot);

static inline bool corpus_weighted(const char* alternative) { return isdigit((unsigned char)*alternative); }

// Writes the template from `text` to `end`. Choices nest.
static inline void corpus_expand(CorpusWalk* w, const char* text, const char* end) {
    while (text < end) {
        if (*text == '$') {
            corpus_slot(w, text[1]);
            text += 2;
        } else if (*text == '[') {
            const char* starts[17];
            int weights[16], count = 0, depth = 0;
            starts[0] = ++text;
            for (; depth || *text != ']'; text++) {
                if (*text == '|' && !depth) starts[++count] = text + 1;
                depth += (*text == '[') - (*text == ']');
            }
            starts[++count] = ++text;           // one past the end, as if another alternative began there
            for (int k = 0; k < count; k++) weights[k] = corpus_weighted(starts[k]) ? *starts[k] - '0' : 1;
            int k = corpus_choose(w, weights, count);
            corpus_expand(w, starts[k] + corpus_weighted(starts[k]), starts[k + 1] - 1);
        } else corpus_put(w, *text++);
    }
}

// Gender and name are drawn where they first show, not earlier: there their information belongs.
static inline const char* corpus_gender(CorpusWalk* w, int person) {
    const int even[2] = {1, 1};
    int* girl = &w->world.girl[person];
    if (*girl < 0) *girl = corpus_choose(w, even, 2);
    return *girl ? "girl" : "boy";
}

static inline void corpus_name(CorpusWalk* w, int person) {
    CorpusWorld* s = &w->world;
    corpus_gender(w, person);
    if (s->name[person] < 0) {
        unsigned used = s->name[!person] < 0 ? 0 : 1u << s->name[!person];
        s->name[person] = corpus_pick(w, s->girl[person] ? 0 : CORPUS_NAMES / 2, CORPUS_NAMES / 2, used);
    }
    corpus_write(w, corpus_names[s->name[person]]);
}

static inline void corpus_subject(CorpusWalk* w, int person) {
    CorpusWorld* s = &w->world;
    const int weights[2] = {1, 1};
    if (s->last == person && !corpus_choose(w, weights, 2)) corpus_write(w, s->girl[person] ? "she" : "he");
    else corpus_name(w, person);
    s->last = person;
}

// A thing of the actor that the story did not have yet.
static inline void corpus_new_thing(CorpusWalk* w) {
    CorpusWorld* s = &w->world;
    unsigned nouns = 0, looks = 0;
    for (int t = 0; t < s->thing_count; t++) {
        nouns |= 1u << s->things[t].noun;
        looks |= 1u << s->things[t].look;
    }
    CorpusThing* thing = &s->things[s->t = s->thing_count++];
    thing->look = corpus_pick(w, 0, CORPUS_LOOKS, looks);
    corpus_write(w, strchr("aeiou", corpus_looks[thing->look][0]) ? "an " : "a ");
    corpus_write(w, corpus_looks[thing->look]);
    corpus_write(w, " ");
    thing->noun = corpus_pick(w, 0, CORPUS_THINGS, nouns);
    corpus_write(w, corpus_things[thing->noun].noun);
    thing->holder = thing->owner = s->x;
}

static inline void corpus_the_thing(CorpusWalk* w, int t) {
    const int weights[2] = {3, 2};
    corpus_write(w, "the ");
    if (corpus_choose(w, weights, 2)) {
        corpus_write(w, corpus_looks[w->world.things[t].look]);
        corpus_write(w, " ");
    }
    corpus_write(w, corpus_things[w->world.things[t].noun].noun);
}

// A place other than `here`; where the story has been, it likes to return.
static inline int corpus_new_place(CorpusWalk* w, int here) {
    int weights[CORPUS_PLACES];
    for (int k = 0; k < CORPUS_PLACES; k++)
        weights[k] = k == here ? 0 : w->world.visited >> k & 1 ? 6 * CORPUS_PLACES : 2 * CORPUS_PLACES - k;
    int place = corpus_choose(w, weights, CORPUS_PLACES);
    w->world.visited |= 1u << place;
    return place;
}

// The first thing that a holder has, -1 if none.
static inline int corpus_held(const CorpusWorld* s, int holder) {
    for (int t = 0; t < s->thing_count; t++)
        if (s->things[t].holder == holder) return t;
    return -1;
}

static inline void corpus_template(CorpusWalk* w, const char* text) {
    corpus_expand(w, text, text + strlen(text));
}

// "the mill", or with its preposition "at the mill"; now and then with the weather there.
static inline void corpus_place(CorpusWalk* w, bool at, int place) {
    if (at) corpus_write(w, corpus_places[place].at), corpus_put(w, ' ');
    corpus_template(w, "the $P");
    corpus_write(w, corpus_places[place].noun);
}

static inline void corpus_phrase(CorpusWalk* w, char slot) {
    size_t k = 0, count = sizeof corpus_phrases / sizeof *corpus_phrases;
    while (k < count && corpus_phrases[k].slot != slot) k++;
    assert(k < count);
    corpus_template(w, corpus_phrases[k].text);
}

static inline const char* corpus_wrong_answer(CorpusWalk* w) {
    return corpus_riddles[corpus_pick(w, 0, CORPUS_RIDDLES, 1u << w->world.riddle)].answer;
}

static inline void corpus_slot(CorpusWalk* w, char slot) {
    CorpusWorld* s = &w->world;
    int x = s->x, y = !x;
    CorpusThing* thing = &s->things[s->t];
    switch (slot) {
    case 'x': corpus_subject(w, x); break;
    case 'n': corpus_name(w, x); s->last = x; break;
    case 'y': corpus_template(w, "[2$N|$h friend]"); break;
    case 'Y': corpus_template(w, "[2$N|$h friend]"); s->last = y; break;
    case 'N': corpus_name(w, y); break;
    case 'h': corpus_write(w, s->girl[x] ? "her" : "his"); break;
    case 'c': corpus_write(w, corpus_gender(w, x)); break;
    case 'a': corpus_new_thing(w); break;
    case 't': corpus_the_thing(w, s->t); break;
    case 'b': corpus_write(w, corpus_things[thing->noun].noun); break;
    case 'v': corpus_the_thing(w, corpus_held(s, y)); break;
    case 'u': corpus_template(w, corpus_things[thing->noun].use); break;
    case 'l': corpus_place(w, true, s->place[x] = corpus_new_place(w, s->place[y])); break;
    case 'L': corpus_place(w, false, s->place[x] = corpus_new_place(w, s->place[y])); break;
    case 'g': corpus_place(w, false, s->goal = corpus_new_place(w, s->place[x])); break;
    case 'w': if (s->goal == s->place[y]) corpus_template(w, ", where $y [was waiting|was]"); break;
    case 'p': corpus_place(w, true, s->place[x]); break;
    case 'q': corpus_place(w, true, thing->place); break;
    case 'Q': corpus_place(w, false, thing->place); break;
    case 'o': corpus_place(w, false, s->place[y]); break;
    case 'e': corpus_place(w, true, s->place[CORPUS_ANIMAL]); break;
    case 'i': corpus_write(w, corpus_spots[thing->spot = corpus_pick(w, 0, CORPUS_SPOTS, 0)]); break;
    case 'I': corpus_write(w, corpus_spots[thing->spot]); break;
    case 'd': corpus_write(w, corpus_days[s->day = corpus_pick(w, 0, CORPUS_DAYS, 0)]); break;
    case 'D': corpus_write(w, corpus_days[s->day]); break;
    case 'z': corpus_write(w, "the "); corpus_write(w, corpus_animals[s->animal]); break;
    case 'Z': corpus_write(w, corpus_animals[s->animal = corpus_pick(w, 0, CORPUS_ANIMALS, 0)]); break;
    case 'r': s->riddle = corpus_pick(w, 0, CORPUS_RIDDLES, 0);
              corpus_write(w, corpus_riddles[s->riddle].question); break;
    case 'A': corpus_write(w, corpus_riddles[s->riddle].answer); break;
    case 'B': corpus_write(w, corpus_wrong_answer(w)); break;
    default: corpus_phrase(w, slot);
    }
}

// ------------------------------------------------------------------------------------------------
// Events. An event is possible for an actor x and a thing t when all that it needs is a fact of the two.

enum {
    IF_HAS = 1 << 0,        // x has t
    IF_Y_HAS = 1 << 1,      // the other child has it
    IF_Z_HAS = 1 << 2,      // the animal has it
    IF_LIES = 1 << 3,       // nobody has it, and it lies
    IF_HERE = 1 << 4,       //     where x is
    IF_AWAY = 1 << 5,       //     elsewhere
    IF_MINE = 1 << 6,       // it belongs to x
    IF_YOURS = 1 << 7,      // it belongs to the other child
    IF_PROMISED = 1 << 8,   // x has promised it to the other child
    IF_ABOUT_A_THING = (1 << 9) - 1,
    IF_TOGETHER = 1 << 9, IF_APART = 1 << 10,
    IF_TRADE = 1 << 11,     // the other child has something of its own
    IF_FREE = 1 << 12,      // no promise is open
    IF_UNMET = 1 << 13, IF_Z_NEAR = 1 << 14, IF_Z_FAR = 1 << 15,
    IF_UNASKED = 1 << 16, IF_RIDDLE = 1 << 17,      // x owes an answer
    IF_RAIN = 1 << 18, IF_DRY = 1 << 19,
    IF_RIPE = 1 << 20, IF_LATE = 1 << 21            // the story may end, should end
};
#define DID(effect) (1u << (22 + (effect)))         // x has done it; of the first eight effects only

typedef enum {
    DO_GIVE, DO_RETURN, DO_LOSE, DO_LIE, DO_WIN, DO_FAIL, DO_KEEP, DO_BREAK,
    DO_TELL, DO_GO, DO_GO_BOTH, DO_JOIN, DO_VISIT, DO_FETCH, DO_TAKE, DO_DROP, DO_SWAP, DO_MEET, DO_ASK,
    DO_PROMISE, DO_WEATHER, DO_END
} CorpusEffect;

typedef struct { int weight; unsigned needs; CorpusEffect effect; const char* text; } CorpusEvent;

static const CorpusEvent corpus_heroes[] = {
    {4, 0, DO_TELL,
     "[3once upon a time |2long ago |once |2]there [was|lived] a $k $c [2called|named] $n $l."},
    {2, 0, DO_TELL, "$l lived a $k $c [2called|named] $n."},
    {2, 0, DO_TELL, "a $k $c [2called|named] $n lived $l."},
};

static const CorpusEvent corpus_treasures[] = {
    {4, 0, DO_TELL,
     "$x had $a[4|, a gift from $h [grandmother|father|uncle]|, and nothing else|, and loved it]."},
    {2, 0, DO_TELL,
     "one [morning|day|summer] $x found $a [under the bed|behind the house|on the road|in a box]."},
    {2, 0, DO_TELL, "for $h birthday $x [got|was given] $a."},
};

static const CorpusEvent corpus_friends[] = {
    {3, 0, DO_TELL, "$N's [3best|old|good|only] friend $n lived $l and [3had|owned|loved] $a."},
    {2, 0, DO_TELL, "$N [often|sometimes|always] played with $n, a $k $c from $L, who [2had|owned] $a."},
};

static const CorpusEvent corpus_events[] = {
    // going about
    {5, IF_TOGETHER, DO_GO_BOTH, "\n$W$x and $y $M to $g[2| together| hand in hand]."},
    {3, 0, DO_GO, "\n$W$x $M to $g[3| alone| in the wind]$w."},
    {9, IF_APART, DO_JOIN, "\n$W$x [wanted to see|missed|looked for|thought of] $y and $M to $o."},
    // having
    {6, IF_HAS, DO_TELL, "$T$x $u."},
    {2, IF_HAS | IF_MINE, DO_TELL, "$x was [very |so |][proud|fond|afraid|tired] of $t."},
    {3, IF_HAS | IF_YOURS, DO_TELL, "$x liked $t [more and more|and did not want to give it back]."},
    {3, IF_HAS | IF_MINE | IF_TOGETHER | IF_FREE, DO_GIVE,
     "$T$x gave $t to $y$H. \"[3Thank you|How kind of you|You are a true friend|For me]!\" $S $Y."},
    {2, IF_HAS | IF_MINE | IF_TOGETHER | IF_FREE, DO_GIVE,
     "\"[This is for you|Take it|Close your eyes]$!\" $S $n, and gave $t to $y."},
    {3, IF_Y_HAS | IF_YOURS | IF_TOGETHER | IF_FREE, DO_TAKE,
     "\"[May I borrow|Will you lend me] your $b?\" asked $n$H. "
     "\"[Yes|Of course|Only for today]$!\" $S $Y."},
    {2, IF_Y_HAS | IF_YOURS | IF_TOGETHER | IF_FREE, DO_TELL,
     "\"[May I borrow|Will you lend me] your $b?\" asked $n$H. "
     "\"No[2|, it is mine|, not today]$!\" $S $Y."},
    {6, IF_HAS | IF_YOURS | IF_TOGETHER, DO_RETURN, "$T$x gave $t back to $y$H."},
    {4, IF_HAS | IF_YOURS | IF_TOGETHER, DO_LIE,
     "\"Where is my $b?\" asked $Y$H. \"[I do not know|I have not seen it|Somebody took it],\" lied $n$H."},
    {4, IF_Y_HAS | IF_MINE | IF_TOGETHER, DO_TAKE,
     "\"[Where is my $b|May I have my $b back]?\" asked $n$H. \"[Here it is|Take it]$!\" $S $Y."},
    {3, IF_HAS | IF_MINE | IF_TOGETHER | IF_FREE | IF_TRADE, DO_SWAP,
     "\"I will give you $t for $v$!\" $S $n$H. \"[Agreed|Gladly|Why not|Yes]!\" $S $Y."},
    {1, IF_HAS | IF_MINE | IF_TOGETHER | IF_FREE | IF_TRADE, DO_TELL,
     "\"I will give you $t for $v$!\" $S $n$H. \"[Never|No|I like mine better]$!\" $S $Y."},
    // losing and finding
    {3, IF_HAS | IF_MINE, DO_LOSE, "[but |then |2]$x [lost|dropped|forgot] $t $i $p."},
    {2, IF_HAS, DO_DROP, "$T$x hid $t $i $p."},
    {9, IF_LIES | IF_HERE, DO_TAKE, "$T$x [2found|saw|came upon] $t $I and [picked it up|took it$H]."},
    {6, IF_LIES | IF_AWAY | IF_MINE, DO_FETCH, "\n$W$x $M back to $Q and [2found $t|there lay $t] $I."},
    {5, IF_LIES | IF_AWAY | IF_MINE | IF_TOGETHER, DO_TELL,
     "\"[Have you seen|Where is] my $b?\" asked $n$H. \"[I saw it|You left it|It must be] $q$!\" $S $Y."},
    {4, IF_LIES | IF_MINE, DO_TELL,
     "$T$x [cried|was sad|sighed|was angry|frowned|could not sleep], because $t was gone."},
    {3, IF_LIES | IF_MINE | IF_TOGETHER, DO_TELL,
     "\"[What is wrong|Why are you so quiet]?\" asked $Y$H. \"I [lost|cannot find|miss] my $b$!\" $S $n."},
    // promising
    {3, IF_HAS | IF_MINE | IF_TOGETHER | IF_FREE, DO_PROMISE,
     "\"I will give you my $b $d,\" [promised|vowed] $n$H."},
    {24, IF_HAS | IF_PROMISED, DO_KEEP,
     "\n$D $x [kept the promise|remembered the promise] and [gave|brought] $t to $y$H."},
    {9, IF_HAS | IF_PROMISED, DO_BREAK,
     "\n$D $y waited [all day|for hours], but $n [did not come|forgot the promise|never came]."},
    {24, IF_LIES | IF_PROMISED, DO_BREAK,
     "\n$D $x had no $b to give. \"I am [so |]sorry$!\" $S $n$H. $Y [was angry|said nothing|understood]."},
    // the animal and its riddle
    {4, IF_UNMET, DO_MEET,
     "$T$x met [2a grey|a talking|a white|a hungry|an old|a fat|a black] $Z $p. it had $a."},
    {12, IF_Z_HAS | IF_Z_NEAR | IF_UNASKED, DO_ASK,
     "$z [looked at|turned to|winked at] $n. \"$r?\" it asked. "
     "\"[Answer|Tell me|Guess], and $t is yours,\" it [said|added]."},
    {9, IF_RIDDLE, DO_TELL, "$T$x thought [about the riddle|long and hard|until $h head hurt]."},
    {9, IF_RIDDLE | IF_TOGETHER, DO_TELL, "\"[I think|Maybe] it is $A$!\" $S $Y$H."},
    {3, IF_RIDDLE | IF_TOGETHER, DO_TELL, "\"[I think|Maybe] it is $B$!\" $S $Y$H."},
    {30, IF_RIDDLE | IF_Z_FAR, DO_VISIT, "\n$W$x $M back to $z $e."},
    {36, IF_RIDDLE | IF_Z_NEAR | IF_Z_HAS, DO_WIN,
     "\"[It is|It must be] $A$!\" $S $n$H. \"[Right|Well done|Clever $c],\" said $z, and $n got $t."},
    {12, IF_RIDDLE | IF_Z_NEAR | IF_Z_HAS, DO_FAIL,
     "\"[It is|It must be] $B$!\" $S $n$H. \"[Wrong|No],\" said $z, and [kept|went away with] $t."},
    // talk and weather
    {2, IF_TOGETHER, DO_TELL,
     "\"I am [so |very |][hungry|thirsty]$!\" $S $n$H. "
     "\"[Here is an apple|Have some milk|So am I|I have nothing|We must go home]$!\" $S $Y."},
    {2, IF_TOGETHER, DO_TELL,
     "\"I am [so |very |][tired|cold]$!\" $S $n$H. "
     "\"[Let us rest|Sit down|So am I|Come closer|We must go home]$!\" $S $Y."},
    {2, IF_TOGETHER | IF_DRY, DO_TELL,
     "\"What a [lovely|warm|fine|bright] day$!\" $S $n$H. $Y [smiled|nodded]."},
    {2, IF_DRY, DO_WEATHER, "[suddenly|then] it began to rain, and $x [got wet|ran under a tree|sneezed]."},
    {2, IF_RAIN | IF_TOGETHER, DO_TELL,
     "\"[My shoes are wet|I hate rain]$!\" $S $n$H. $Y [laughed|shrugged]."},
    {4, IF_RAIN, DO_WEATHER,
     "[at last|then] the [rain stopped|sun came out], and $x [was glad|laughed|sang]."},
    {6, 0, DO_TELL,
     "$T$x [2saw|heard|counted|met|watched|fed] $j [birds|goats|ducks|bees|dogs|cats|frogs|sheep] $p."},
    {5, 0, DO_TELL,
     "$T$x [2ate|picked|bought|found|dropped] $J [pears|plums|nuts|apples|cherries|buns|cakes]$H."},
    {4, IF_TOGETHER, DO_TELL,
     "$T$x and $y [built|drew|dreamed of] a [2big|tiny|white|round] [castle|ship|horse|tower]."},
    {4, IF_DRY, DO_TELL,
     "the [2wind|air|path|sky|water] "
     "was [cold|warm|still|grey|dark|bright], and $x [sang|waited|smiled|sat down]$H."},
    // ending
    {9, IF_RIPE, DO_END,
     "\n[in the end|when the stars came out|at sunset|when it got dark|at dinner time|when the bell rang] "
     "$x and $y [2went home|said goodbye|sat by the fire|told each other stories]$H."},
    {99, IF_LATE, DO_END, "\nit was [late|dark|bedtime|cold] now, and $x [said goodbye|went home|yawned]$H."},
};

static const CorpusEvent corpus_fates[] = {     // of a thing
    {1, IF_HAS | IF_MINE, DO_TELL, "$n [2kept|still has|took good care of|loves|never sold|often uses] $t."},
    {1, IF_HAS | IF_YOURS, DO_TELL, "$n never gave $t back."},
    {1, IF_LIES | IF_MINE, DO_TELL, "$n never [saw|found] $t again[2|; it still lies $q]."},
};

static const CorpusEvent corpus_morals[] = {
    {1, 0, DO_TELL, "that night $n [slept well|lay awake|dreamed of [the sea|a dragon|snow|gold]]."},
    {9, DID(DO_GIVE), DO_TELL, "$n $E [giving makes two people happy|giving beats having|gifts come back]."},
    {9, DID(DO_KEEP), DO_TELL, "$n $E [a promise is a promise|a kept word is worth gold|trust is earned]."},
    {9, DID(DO_BREAK), DO_TELL, "$n $E [a broken word is hard to mend|words have weight|friends remember]."},
    {9, DID(DO_LIE), DO_TELL, "$n $E [a lie has short legs|nobody trusts a liar|the truth comes out]."},
    {9, DID(DO_WIN), DO_TELL, "$n $E [a good head opens every door|thinking pays|riddles are keys]."},
    {9, DID(DO_FAIL), DO_TELL, "$n $E [nobody knows everything|all can be wrong|one must think first]."},
    {9, DID(DO_RETURN), DO_TELL, "$n $E [honest friends are best|borrowed things come home|honesty pays]."},
    {9, DID(DO_LOSE), DO_TELL, "$n $E [little things are lost quickly|good things need care|hands forget]."},
};

// What is true of actor x and thing t.
static inline unsigned corpus_facts(const CorpusWorld* s, int x, int t) {
    const CorpusThing* thing = &s->things[t];
    const int holds[4] = {IF_HAS, IF_Y_HAS, IF_Z_HAS, IF_LIES};
    int y = !x, trade = corpus_held(s, y), here = s->place[x];
    bool settled = s->riddle_for < 0 && s->promise_by < 0, asked = s->riddle >= 0, met = s->animal >= 0;
    unsigned facts = s->deeds[x];
    facts |= holds[thing->holder == y ? 1 : thing->holder == x ? 0 : thing->holder];
    if (thing->holder == CORPUS_NOBODY) facts |= thing->place == here ? IF_HERE : IF_AWAY;
    if (thing->owner < 2) facts |= thing->owner == x ? IF_MINE : IF_YOURS;
    if (s->promise_by == x && s->promised == t) facts |= IF_PROMISED;
    facts |= here == s->place[y] ? IF_TOGETHER : IF_APART;
    if (trade >= 0 && s->things[trade].owner == y) facts |= IF_TRADE;
    if (s->promise_by < 0) facts |= IF_FREE;
    facts |= !met ? IF_UNMET : here == s->place[CORPUS_ANIMAL] ? IF_Z_NEAR : IF_Z_FAR;
    if (!asked) facts |= IF_UNASKED;
    if (s->riddle_for == x) facts |= IF_RIDDLE;
    facts |= s->raining ? IF_RAIN : IF_DRY;
    if (settled && s->told >= 3) facts |= s->told >= 6 ? IF_LATE : IF_RIPE;
    return facts;
}

// Gives the thing to a holder who keeps it.
static inline void corpus_hand(CorpusThing* thing, int holder) { thing->holder = thing->owner = holder; }

// What the event that was just told changes.
static inline void corpus_apply(CorpusWorld* s, CorpusEffect effect) {
    int x = s->x, y = !x;
    CorpusThing* thing = &s->things[s->t];
    if (effect < DO_TELL) s->deeds[x] |= DID(effect);
    switch (effect) {
    case DO_GO: s->place[x] = s->goal; break;
    case DO_GO_BOTH: s->place[x] = s->place[y] = s->goal; break;
    case DO_JOIN: s->place[x] = s->place[y]; break;
    case DO_VISIT: s->place[x] = s->place[CORPUS_ANIMAL]; break;
    case DO_FETCH: s->place[x] = thing->place; thing->holder = x; break;
    case DO_TAKE:
        thing->holder = x;
        if (s->promise_by == y && s->promised == s->t) s->promise_by = -1;      // it came without being kept
        break;
    case DO_GIVE: case DO_RETURN: corpus_hand(thing, y); break;
    case DO_DROP: case DO_LOSE: thing->holder = CORPUS_NOBODY; thing->place = s->place[x]; break;
    case DO_SWAP: corpus_hand(&s->things[corpus_held(s, y)], x); corpus_hand(thing, y); break;
    case DO_MEET: corpus_hand(thing, CORPUS_ANIMAL); s->place[CORPUS_ANIMAL] = s->place[x]; break;
    case DO_ASK: s->riddle_for = x; break;
    case DO_WIN: corpus_hand(thing, x); s->riddle_for = -1; break;
    case DO_FAIL: s->riddle_for = -1; break;
    case DO_PROMISE: s->promise_by = x; s->promised = s->t; break;
    case DO_KEEP: corpus_hand(thing, y); s->place[x] = s->place[y]; s->promise_by = -1; break;
    case DO_BREAK: s->promise_by = -1; break;
    case DO_WEATHER: s->raining = !s->raining; break;
    case DO_TELL: case DO_LIE: case DO_END: break;
    }
}

// Tells one possible event of the table with an actor of first_x .. last_x. Rows in `told` (NULL: none) are
// told again less often. False if nothing is possible or the story has ended.
static inline bool corpus_tell(CorpusWalk* w, const CorpusEvent* table, size_t size, int first_x, int last_x,
                               uint64_t* told) {
    CorpusWorld* s = &w->world;
    int weights[CORPUS_MAX_CHOICES], row[CORPUS_MAX_CHOICES], bound[CORPUS_MAX_CHOICES], count = 0;
    int rows = (int)(size / sizeof *table), things = s->thing_count ? s->thing_count : 1;
    for (int xt = 3 * first_x; xt < 3 * last_x + 3; xt++) {
        int x = xt / 3, t = xt % 3;
        if (t >= things) continue;
        unsigned facts = corpus_facts(s, x, t);
        for (int k = 0; k < rows; k++) {
            unsigned needs = table[k].needs;
            if ((needs & facts) != needs || (t && !(needs & IF_ABOUT_A_THING))) continue;
            weights[count] = table[k].weight * (told && *told >> k & 1 ? 1 : 6);
            row[count] = k;
            bound[count++] = xt;
        }
    }
    if (!count) return false;
    int chosen = corpus_choose(w, weights, count);
    const CorpusEvent* event = &table[row[chosen]];
    if (told) *told |= (uint64_t)1 << row[chosen];
    s->x = bound[chosen] / 3;
    s->t = bound[chosen] % 3;
    if (s->begun && event->text[0] != '\n') corpus_put(w, ' ');
    s->begun = true;
    corpus_template(w, event->text);
    corpus_apply(s, event->effect);
    return event->effect != DO_END;
}

// ------------------------------------------------------------------------------------------------
// Stories

static inline void corpus_begin(CorpusWorld* s) {
    memset(s, 0, sizeof *s);
    s->sentence_starts = true;
    s->last = CORPUS_NOBODY;
    s->animal = s->riddle = s->riddle_for = s->promise_by = s->promised = -1;
    for (int k = 0; k < 3; k++) s->place[k] = -1;
    for (int k = 0; k < 2; k++) s->name[k] = s->girl[k] = -1;
}

static inline void corpus_story(CorpusWalk* w) {
    CorpusWorld* s = &w->world;
    uint64_t told = 0;
    corpus_begin(s);
    corpus_tell(w, corpus_heroes, sizeof corpus_heroes, 0, 0, NULL);
    corpus_tell(w, corpus_treasures, sizeof corpus_treasures, 0, 0, NULL);
    corpus_tell(w, corpus_friends, sizeof corpus_friends, 1, 1, NULL);
    while (corpus_tell(w, corpus_events, sizeof corpus_events, 0, 1, &told)) s->told++;
    corpus_tell(w, corpus_fates, sizeof corpus_fates, 0, 1, NULL);
    corpus_tell(w, corpus_morals, sizeof corpus_morals, 0, 1, NULL);
    corpus_write(w, "\n\n");
}

// Fills text with `bytes` bytes of the seed's stories, the last one cut; longer texts start with shorter.
// nats, if not NULL, gets (bytes) numbers: -ln p of each choice, booked at the byte where it begins to show.
static inline void corpus_generate(char* text, float* nats, size_t bytes, uint64_t seed) {
    CorpusWalk walk;
    memset(&walk, 0, sizeof walk);
    walk.text = text;
    walk.nats = nats;
    walk.capacity = bytes;
    walk.decide = corpus_draw;
    walk.seed = seed;
    for (size_t k = 0; nats && k < bytes; k++) nats[k] = 0;
    while (walk.length < bytes) corpus_story(&walk);
}

#endif
