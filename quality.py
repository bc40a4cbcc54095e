"""Figures of generated text beside the same figures of real text.

No single one of them means much: a model that repeats one likely sentence has a low n-gram perplexity, and known words
alone make no sentence. Perplexity is shown with entropy and distinct n-grams for this reason.
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import numpy as np

import data

REFERENCE_CHARS = 20_000_000  # of the training text that the n-gram model is fitted on
N_BOOTSTRAP = 200


@dataclass
class Reference:
    """Words of the training text and counts of its token n-grams, orders 1 to `order`."""

    words: set
    counts: list  # one a length: sorted keys of n-grams, how often each occurs
    followers: list  # one a length of history: sorted keys, how often it occurs, by how many tokens it is followed
    tokenizer: object

    @classmethod
    def fit(cls, corpus, tokenizer, part="all"):
        """Count a part of a text file. Vocabularies under 400, characters say, get 6-grams, larger ones 3-grams.

        Raises ValueError for a part without text.
        """
        K, order = len(tokenizer), 6 if len(tokenizer) < 400 else 3
        words, rows, n_chars = set(), [], 0
        for piece in data.read_part(corpus, part):
            words.update(piece.text.split())
            if n_chars < REFERENCE_CHARS:
                rows.append(piece.text)
                n_chars += len(piece.text)
        if not words:
            raise ValueError(f"{corpus} has no text to hold samples against")
        stream = _stream(tokenizer.encode_as_numpy(rows), K, order)
        counts, followers = [], []
        for n in range(1, order + 1):
            keys = _keys(stream, n, K)
            kept = stream[order - 1 :] < K  # n-grams end in a token, not in the mark between lines
            key, count = np.unique(keys[order - n :][kept], return_counts=True)
            history, first = np.unique(key // (K + 1), return_index=True)
            counts.append((key, count))
            followers.append((history, np.add.reduceat(count, first), np.diff(np.append(first, len(key)))))
        return cls(words, counts, followers, tokenizer)

    def nats(self, text):
        """-log P of a text's tokens, interpolated by Witten and Bell's rule, summed -> (nats, number of tokens)."""
        K, order = len(self.tokenizer), len(self.counts)
        stream = _stream([self.tokenizer.encode(text)], K, order)[: -(order - 1) or None]
        if len(stream) < order:
            return 0.0, 0
        p = np.full(len(stream) - order + 1, 1 / K)
        for n in range(1, order + 1):
            key = _keys(stream, n, K)[order - n :]
            count = _look_up(key, *self.counts[n - 1])
            total = _look_up(key // (K + 1), *self.followers[n - 1][:2])
            kinds = _look_up(key // (K + 1), self.followers[n - 1][0], self.followers[n - 1][2])
            p = np.where(total > 0, (count + kinds * p) / np.maximum(1, total + kinds), p)
        return -np.log(p).sum(), len(p)


def _stream(rows, K, order):
    """Token rows in one line, each with order - 1 marks (id K) before it and after the last."""
    marks = np.full(order - 1, K)
    return np.concatenate([part for row in rows for part in (marks, row)] + [marks]).astype(np.int64)


def _keys(stream, n, K):
    """One integer for each n-gram of a stream: (len(stream) - n + 1,) int64. Raises ValueError where they do not fit."""
    if (K + 1) ** n >= 2**63:
        raise ValueError(f"a vocabulary of {K} is too large for {n}-grams")
    keys = np.zeros(len(stream) - n + 1, dtype=np.int64)
    for i in range(n):
        keys = keys * (K + 1) + stream[i : len(stream) - n + 1 + i]
    return keys


def _look_up(key, keys, values):
    at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
    return np.where(keys[at] == key, values[at], 0)


def _words(texts):
    return [text.split() for text in texts]


def _ratio(pairs):
    top, bottom = np.sum(pairs, 0)
    return top / max(bottom, 1e-9)


def _distinct(rows, n):
    grams = [gram for words in rows for gram in zip(*(islice(words, i, None) for i in range(n)), strict=False)]
    return len(set(grams)) / max(1, len(grams))


def _entropy(rows):
    counts = np.array(list(Counter(word for words in rows for word in words).values()) or [1])
    return -(counts / counts.sum() * np.log2(counts / counts.sum())).sum()


def figures(texts, reference, seed=0):
    """Judge a list of texts -> {figure: (value, low, high)}, 95 % intervals of the bootstrap's spread over texts.

    The spread and not the quantiles: a resample repeats texts, which alone makes it less diverse than the whole.
    """
    rows = _words(texts)
    known = [(sum(word in reference.words for word in words), len(words)) for words in rows]
    nats = [reference.nats(text) for text in texts]
    judges = {
        "known words": lambda i: _ratio([known[j] for j in i]),
        "distinct bigrams": lambda i: _distinct([rows[j] for j in i], 2),
        "word entropy (bits)": lambda i: _entropy([rows[j] for j in i]),
        "n-gram perplexity": lambda i: math.exp(_ratio([nats[j] for j in i])),
    }
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(texts), size=(N_BOOTSTRAP, len(texts)))
    result = {}
    for name, judge in judges.items():
        value, spread = judge(range(len(texts))), 1.96 * np.std([judge(i) for i in draws])
        result[name] = (float(value), float(value - spread), float(value + spread))
    return result


def table(judged):
    """{row: {figure: (value, low, high)}} -> lines of text."""
    names = next(iter(judged.values()))
    lines = ["", " " * 24 + "".join(f"{name:>26}" for name in names)]
    for row, values in judged.items():
        lines.append(f"{row:24}" + "".join(f"{v:10.3f} [{low:6.3f}, {high:6.3f}]" for v, low, high in values.values()))
    return lines
