"""The figures of samples: the n-gram model, and what repetition does."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from exact import vocabulary

from evaluation import quality
from text import toy
from text.tokenizer import load_tokenizer, train_tokenizer


def test_the_n_gram_model_follows_witten_and_bells_rule_and_sums_to_one(tmp_path):
    (tmp_path / "text.txt").write_text("a b a b a c\nb a\n")
    (tmp_path / "model").write_bytes(train_tokenizer(tmp_path / "text.txt", "word", 100))
    tokenizer = load_tokenizer(tmp_path / "model")
    reference = quality.Reference.fit(tmp_path / "text.txt", tokenizer)
    assert reference.words == {"a", "b", "c"}
    K = len(tokenizer)
    nats, n = reference.nats("a")  # the start of a line was seen twice, with 2 successors, "a" once
    unigram = (4 + 3 / K) / (8 + 3)
    p = unigram
    for _ in range(5):  # orders 2 to 6, whose histories are the marks before the line
        p = (1 + 2 * p) / (2 + 2)
    assert n == 1 and nats == pytest.approx(-math.log(p))
    known = sum(math.exp(-reference.nats(f"a b {w}")[0] + reference.nats("a b")[0]) for w in "abc")
    unseen = math.exp(
        -reference.nats("a b zebra")[0] + reference.nats("a b")[0]
    )  # the unknown token
    assert known + (K - 3) * unseen == pytest.approx(1)


def test_the_n_gram_divergence_is_that_of_jensen_and_shannon(tmp_path):
    """Equal texts have 0 bits, those without a common n-gram 1, others the mean of two KL."""
    (tmp_path / "text.txt").write_text("a b a b a c\nb a\n")
    (tmp_path / "model").write_bytes(train_tokenizer(tmp_path / "text.txt", "word", 100))
    reference = quality.Reference.fit(tmp_path / "text.txt", load_tokenizer(tmp_path / "model"))

    def divergence(*texts):
        return reference.divergence(np.concatenate([reference.find_cells(text) for text in texts]))

    assert divergence("a b a b a c", "b a") == pytest.approx(0)
    assert divergence("z z z") == pytest.approx(1)
    # "b a" has 2 of the 8 6-grams of the text, which all occur once
    entropy_of_mean = -2 * 5 / 16 * math.log2(5 / 16) - 6 / 16 * math.log2(1 / 16)
    assert divergence("b a") == pytest.approx(entropy_of_mean - (1 + 3) / 2)


def test_new_n_grams_are_as_common_as_those_that_the_training_text_has_once(tmp_path, monkeypatch):
    """One of its four words would be new without itself, as one of the four of other text is."""
    monkeypatch.setattr(quality, "N_COMMON", 1)
    (tmp_path / "text.txt").write_text("a\na\na\nb\n")
    (tmp_path / "model").write_bytes(train_tokenizer(tmp_path / "text.txt", "word", 100))
    reference = quality.Reference.fit(tmp_path / "text.txt", load_tokenizer(tmp_path / "model"))
    cells = [reference.find_cells(text) for text in ("a", "a", "a", "zebra")]
    assert cells[-1] == [0] and reference.divergence(np.concatenate(cells)) == pytest.approx(0)


def test_the_real_text_is_nearer_than_repeated_or_noisy_text(tmp_path):
    corpus, texts = toy.corpus(2000), toy.corpus(100, seed=1).splitlines()
    (tmp_path / "text.txt").write_text(corpus)
    (tmp_path / "model").write_bytes(train_tokenizer(tmp_path / "text.txt", "word", 100))
    reference = quality.Reference.fit(tmp_path / "text.txt", load_tokenizer(tmp_path / "model"))
    shuffled = [" ".join(sorted(text.split())) for text in texts]
    bits = [
        quality.figures(some, reference)["n-gram divergence (bits)"]
        for some in (texts, texts[:10] * 10, shuffled)
    ]
    assert all(bits[0][2] < other[1] for other in bits[1:])


def test_repetition_lowers_entropy_and_compressed_size():
    texts = toy.corpus(30).splitlines()
    reference = SimpleNamespace(
        words=set(vocabulary()),
        nats=lambda text: (len(text.split()), len(text.split())),
        find_cells=str.split,
        divergence=len,
    )
    real, repeated = quality.figures(texts, reference), quality.figures([texts[0]] * 30, reference)
    assert real["known words"][0] == repeated["known words"][0] == 1
    assert real["n-gram perplexity"][0] == pytest.approx(math.e)
    for name in ("word entropy (bits)", "compressed (bits per character)"):
        assert repeated[name][2] < real[name][1]
