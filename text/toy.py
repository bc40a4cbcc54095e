"""The built-in language: a small unambiguous grammar whose entropy is known exactly.

A sentence starts as the symbol "S". Each symbol is replaced by one of its rules, drawn by the
rules' weights, until only words are left. The verb agrees in number with the subject, also if
another noun stands between them; pronouns agree in gender with a name; some sentences repeat a name
at the end. No sentence has two derivations, so the entropy of a sentence is that of its derivation.
"""

import math
import random
from collections import Counter, defaultdict
from functools import cache

# A symbol, and what it becomes with which probability. An indented line continues the last one.
RULES = """
S             .2 CLAUSE-one TIME? | .2 CLAUSE-many TIME? | .15 REPORT-she | .15 REPORT-he
              | .05 RETURN-anna | .05 RETURN-clara | .05 RETURN-emma
              | .05 RETURN-david | .05 RETURN-hugo | .05 RETURN-leo
CLAUSE-one    .4 SUBJECT-one ACT-one | .6 SUBJECT-one VERB-one OBJECT
CLAUSE-many   .4 SUBJECT-many ACT-many | .6 SUBJECT-many VERB-many OBJECT
SUBJECT-one   .5 the ADJECTIVE? NOUN-one | .5 the NOUN-one PLACE the PERSON
SUBJECT-many  .5 the ADJECTIVE? NOUN-many | .5 the NOUN-many PLACE the PERSON
PERSON        .5 ADJECTIVE? NOUN-one | .5 ADJECTIVE? NOUN-many
OBJECT        .7 the ADJECTIVE? THING | .3 the PERSON
ADJECTIVE?    .5 | .5 ADJECTIVE
TIME?         .5 | .5 TIME
PLACE?        .3 | .7 PLACE the ADJECTIVE? THING
REPORT-she    1 NAME-she SAY that she VERB-one her ADJECTIVE? THING PLACE?
REPORT-he     1 NAME-he SAY that he VERB-one his ADJECTIVE? THING PLACE?
RETURN-anna   1 anna VERB-one OBJECT and then anna ACT-one TIME?
RETURN-clara  1 clara VERB-one OBJECT and then clara ACT-one TIME?
RETURN-emma   1 emma VERB-one OBJECT and then emma ACT-one TIME?
RETURN-david  1 david VERB-one OBJECT and then david ACT-one TIME?
RETURN-hugo   1 hugo VERB-one OBJECT and then hugo ACT-one TIME?
RETURN-leo    1 leo VERB-one OBJECT and then leo ACT-one TIME?
"""
# A symbol that becomes one of these words, all equally likely.
WORDS = """
NAME-she   anna clara emma
NAME-he    david hugo leo
NOUN-one   baker dancer farmer king singer teacher
NOUN-many  bakers dancers farmers kings singers teachers
THING      boat chair clock garden house lamp letter mirror ring ship table violin
ADJECTIVE  big blue clean dark light new old small strange
VERB-one   finds follows likes needs sees wants
VERB-many  find follow like need see want
ACT-one    dances laughs runs sings sleeps walks
ACT-many   dance laugh run sing sleep walk
SAY        says thinks
PLACE      behind beside near
TIME       again often slowly today
"""
MOST_WORDS = 12  # of a sentence


def read_grammar():
    """Read RULES and WORDS -> {symbol: [(weight, what it becomes)]}. All else are words."""
    grammar = {}
    for line in RULES.strip().replace("\n ", " ").splitlines():
        symbol, rules = line.split(maxsplit=1)
        bodies = map(str.split, rules.split("|"))
        grammar[symbol] = [(float(weight), tuple(body)) for weight, *body in bodies]
    for line in WORDS.strip().splitlines():
        symbol, *words = line.split()
        grammar[symbol] = [(1 / len(words), (word,)) for word in words]
    return grammar


GRAMMAR = read_grammar()


def sample(rng):
    """Draw one sentence with `rng`, a random.Random -> list of words."""
    words = []
    stack = ["S"]
    while stack:
        symbol = stack.pop()
        if symbol in GRAMMAR:
            weights, bodies = zip(*GRAMMAR[symbol])
            stack.extend(reversed(rng.choices(bodies, weights)[0]))
        else:
            words.append(symbol)
    return words


def corpus(n_sentences, seed=0):
    """Draw sentences independently, one per line -> str."""
    rng = random.Random(seed)
    return "".join(" ".join(sample(rng)) + "\n" for _ in range(n_sentences))


@cache
def entropy(symbol="S"):
    """Compute the entropy in nats of what a symbol becomes: its rule's plus its symbols'."""
    if symbol not in GRAMMAR:
        return 0.0
    return sum(w * (-math.log(w) + sum(map(entropy, body))) for w, body in GRAMMAR[symbol])


@cache
def lengths():
    """Compute the distribution of the number of words of a sentence -> {length: probability}."""
    return _ends((None,) * MOST_WORDS)


def entropy_given_length():
    """Compute H(sentence | length) in nats; a sentence determines its length."""
    return entropy() + sum(p * math.log(p) for p in lengths().values())


def mean_length():
    """Compute the mean number of words of a sentence."""
    return sum(n * p for n, p in lengths().items())


def probability(words):
    """Compute the probability of a sentence, a list of words; 0 if it is not grammatical.

    None stands for any word: the result is the sum over all words at these places.
    """
    return _ends(words).get(len(words), 0.0)


def _ends(words):
    """Find where a sentence that begins like `words` may end -> {number of words: probability}."""

    @cache
    def ends(symbol, start):  # {end: probability that symbol becomes words[start:end]}
        if symbol not in GRAMMAR:
            is_next = start < len(words) and words[start] in (symbol, None)
            return {start + 1: 1.0} if is_next else {}
        total = Counter()
        for weight, body in GRAMMAR[symbol]:
            partial = {start: weight}
            for part in body:
                further = defaultdict(float)
                for i, p in partial.items():
                    for j, q in ends(part, i).items():
                        further[j] += p * q
                partial = further
            total.update(partial)
        return total

    return ends("S", 0)


def is_grammatical(sentence):
    """Tell whether a sentence, a str, belongs to the language."""
    return probability(sentence.split()) > 0
