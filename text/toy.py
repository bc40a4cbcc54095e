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

FEMALE = "anna clara emma".split()
MALE = "david hugo leo".split()
PEOPLE = "baker dancer farmer king singer teacher".split()
THINGS = "boat chair clock garden house lamp letter mirror ring ship table violin".split()
ADJECTIVES = "big blue clean dark light new old small strange".split()
TRANSITIVE = "find follow like need see want".split()
INTRANSITIVE = "dance laugh run sing sleep walk".split()
PLACES = "behind beside near".split()
TIMES = "again often slowly today".split()


def _words(words, ending=""):
    """Make the rules of a symbol that becomes one of these words, all equally likely."""
    return [(1 / len(words), (word + ending,)) for word in words]


def _grammar():
    """Build the rules: symbol -> [(weight, symbols)]. A symbol without rules is a word."""
    rules = {
        "S": [(0.2, (f"CLAUSE {number}", "TIME?")) for number in ("one", "many")]
        + [(0.15, (f"REPORT {pronoun}",)) for pronoun in ("she", "he")]
        + [(0.3 / len(FEMALE + MALE), (f"RETURN {name}",)) for name in FEMALE + MALE],
        "PERSON": [(0.5, ("ADJECTIVE?", f"NOUN {number}")) for number in ("one", "many")],
        "OBJECT": [(0.7, ("the", "ADJECTIVE?", "THING")), (0.3, ("the", "PERSON"))],
        "ADJECTIVE?": [(0.5, ()), (0.5, ("ADJECTIVE",))],
        "TIME?": [(0.5, ()), (0.5, ("TIME",))],
        "PLACE?": [(0.3, ()), (0.7, ("PLACE", "the", "ADJECTIVE?", "THING"))],
        "ADJECTIVE": _words(ADJECTIVES),
        "THING": _words(THINGS),
        "TIME": _words(TIMES),
        "PLACE": _words(PLACES),
        "SAY": _words(["says", "thinks"]),
        "NOUN one": _words(PEOPLE),
        "NOUN many": _words(PEOPLE, "s"),
        "VERB one": _words(TRANSITIVE, "s"),
        "VERB many": _words(TRANSITIVE),
        "ACT one": _words(INTRANSITIVE, "s"),
        "ACT many": _words(INTRANSITIVE),
    }
    for n in ("one", "many"):
        rules[f"SUBJECT {n}"] = [
            (0.5, ("the", "ADJECTIVE?", f"NOUN {n}")),
            (0.5, ("the", f"NOUN {n}", "PLACE", "the", "PERSON")),
        ]
        rules[f"CLAUSE {n}"] = [
            (0.4, (f"SUBJECT {n}", f"ACT {n}")),
            (0.6, (f"SUBJECT {n}", f"VERB {n}", "OBJECT")),
        ]
    for pronoun, names, own in (("she", FEMALE, "her"), ("he", MALE, "his")):
        rules[f"NAME {pronoun}"] = _words(names)
        claim = ("SAY", "that", pronoun, "VERB one", own, "ADJECTIVE?", "THING", "PLACE?")
        rules[f"REPORT {pronoun}"] = [(1.0, (f"NAME {pronoun}", *claim))]
    for name in FEMALE + MALE:
        body = (name, "VERB one", "OBJECT", "and", "then", name, "ACT one", "TIME?")
        rules[f"RETURN {name}"] = [(1.0, body)]
    return rules


GRAMMAR = _grammar()


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


def vocabulary():
    """List all words of the language, sorted."""
    symbols = {word for rules in GRAMMAR.values() for _, body in rules for word in body}
    return sorted(symbols - GRAMMAR.keys())


@cache
def entropy(symbol="S"):
    """Compute the entropy in nats of what a symbol becomes: its rule's plus its symbols'."""
    if symbol not in GRAMMAR:
        return 0.0
    return sum(w * (-math.log(w) + sum(map(entropy, body))) for w, body in GRAMMAR[symbol])


@cache
def lengths(symbol="S"):
    """Compute the distribution of the number of words of a symbol -> {length: probability}."""
    if symbol not in GRAMMAR:
        return {1: 1.0}
    total = Counter()
    for weight, body in GRAMMAR[symbol]:
        partial = {0: weight}
        for part in body:
            longer = defaultdict(float)
            for n, p in partial.items():
                for m, q in lengths(part).items():
                    longer[n + m] += p * q
            partial = longer
        total.update(partial)
    return dict(total)


@cache
def count(symbol="S"):
    """Count the distinct sentences, or the distinct texts that another symbol can become."""
    if symbol not in GRAMMAR:
        return 1
    return sum(math.prod(map(count, body)) for _, body in GRAMMAR[symbol])


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
    words = tuple(words)

    @cache
    def spans(symbol, start):  # {end: probability that symbol becomes words[start:end]}
        if symbol not in GRAMMAR:
            return {start + 1: 1.0} if words[start : start + 1] in ((symbol,), (None,)) else {}
        ends = Counter()
        for weight, body in GRAMMAR[symbol]:
            partial = {start: weight}
            for part in body:
                further = defaultdict(float)
                for i, p in partial.items():
                    for j, q in spans(part, i).items():
                        further[j] += p * q
                partial = further
            ends.update(partial)
        return ends

    return spans("S", 0).get(len(words), 0.0)


def is_grammatical(sentence):
    """Tell whether a sentence, a str, belongs to the language."""
    return probability(sentence.split()) > 0
