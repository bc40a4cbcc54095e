"""The built-in language: its exact figures agree with counting and drawing."""

import math
import random
from collections import Counter

import pytest
from exact import vocabulary

from text import toy
from training import checkpoint


def test_the_weights_of_each_symbols_rules_sum_to_one():
    for symbol, rules in toy.GRAMMAR.items():
        assert sum(weight for weight, _ in rules) == pytest.approx(1), symbol


def test_the_vocabulary_is_small_and_there_are_many_more_sentences_than_a_run_sees():
    assert 50 <= len(vocabulary()) <= 200

    def count(symbol):
        rules = toy.GRAMMAR.get(symbol, [(1, ())])
        return sum(math.prod(map(count, body)) for _, body in rules)

    assert count("S") > 100 * checkpoint.TOY_SENTENCES


def test_the_mean_surprise_of_drawn_sentences_is_the_entropy():
    """-log P averaged over draws: the entropy of derivations, if no sentence has two of them."""
    rng = random.Random(1)
    costs = [-math.log(toy.probability(toy.sample(rng))) for _ in range(4000)]
    mean = sum(costs) / len(costs)
    error = math.sqrt(sum((c - mean) ** 2 for c in costs)) / len(costs)
    assert mean == pytest.approx(toy.entropy(), abs=4 * error)


def test_the_distribution_of_lengths_is_exact_and_its_entropy_is_subtracted():
    rng = random.Random(2)
    counts = Counter(len(toy.sample(rng)) for _ in range(20_000))
    lengths = toy.lengths()
    assert sum(lengths.values()) == pytest.approx(1)
    for n, p in lengths.items():
        assert counts[n] / 20_000 == pytest.approx(p, abs=4 * math.sqrt(p / 20_000))
    h_length = -sum(p * math.log(p) for p in lengths.values())
    assert toy.entropy_given_length() == pytest.approx(toy.entropy() - h_length)
    assert toy.mean_length() == pytest.approx(
        sum(n * c for n, c in counts.items()) / 20_000, abs=0.1
    )


def test_sentences_with_wrong_agreement_are_not_grammatical():
    right = [
        "the king near the old singers sleeps",
        "the kings near the old singer sleep today",
        "anna says that she wants her boat near the clock",
        "hugo sees the lamp and then hugo walks",
        "the singers beside the big king like the boat",
    ]
    assert all(map(toy.is_grammatical, right))
    wrong = [
        "the king near the old singers sleep",
        "anna says that he wants his boat",
        "anna says that she wants his boat",
        "hugo sees the lamp and then leo walks",
        "the king near the old singers",
        "the king sleeps the",
        "",
    ]
    assert not any(map(toy.is_grammatical, wrong))
    assert all(map(toy.is_grammatical, toy.corpus(500, seed=3).splitlines()))


def test_the_same_seed_gives_the_same_corpus():
    assert toy.corpus(50, seed=4) == toy.corpus(50, seed=4) != toy.corpus(50, seed=5)


def test_none_stands_for_any_word():
    sentence = toy.sample(random.Random(3))
    filled = [toy.probability([*sentence[:1], word, *sentence[2:]]) for word in vocabulary()]
    assert toy.probability([*sentence[:1], None, *sentence[2:]]) == pytest.approx(sum(filled))
    assert toy.probability([None] * 9) == pytest.approx(toy.lengths()[9])
