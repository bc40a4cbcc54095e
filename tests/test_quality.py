"""The figures of samples: the n-gram model, and what repetition does."""

import math
from types import SimpleNamespace

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


def test_repetition_lowers_entropy_distinct_bigrams_and_compressed_size():
    texts = toy.corpus(30).splitlines()
    reference = SimpleNamespace(
        words=set(vocabulary()), nats=lambda text: (len(text.split()), len(text.split()))
    )
    real, repeated = quality.figures(texts, reference), quality.figures([texts[0]] * 30, reference)
    assert real["known words"][0] == repeated["known words"][0] == 1
    assert real["n-gram perplexity"][0] == pytest.approx(math.e)
    for name in ("distinct bigrams", "word entropy (bits)", "compressed (bits per character)"):
        assert repeated[name][2] < real[name][1]
