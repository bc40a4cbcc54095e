"""Figures of the quality of generated text, to be compared with the same figures of real text.

A model that repeats one likely sentence has a low n-gram perplexity, and known words do not make a
sentence. So perplexity is shown with three other figures. The entropy says how different the words
are. How far texts compress says what they share, as self-BLEU does, which takes far longer [Shaib
et al. 2024, arXiv 2403.00553]. The n-gram divergence is a distance of distributions [Franca and
Tong 2026, arXiv 2606.08417]: high for texts that are too much alike, and for texts that are too
different. Drawn over the entropy, at several temperatures, it shows what a sampler can do at best
[Pynadath et al. 2026, arXiv 2604.02718].

    stream  (N,)  int64  tokens of all texts in one sequence, with order - 1 marks (the number K)
                         before, between and after
    grams   (n,)  int64  n-grams of tokens, each written as one integer in base K + 1
"""

import bz2
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from data import plan_validation
from text.reading import read_part

REFERENCE_CHARS = 20_000_000  # how much of the training text the n-gram model is fitted to
N_COMMON = 100  # n-grams whose shares are compared one by one
N_RESAMPLES = 200  # for the bootstrap


# ---------------------------------------------------------------- the n-gram model


@dataclass
class Reference:
    """The words of the training text, and a model of its token n-grams of orders 1 to `order`."""

    words: set
    counts: list  # per order: sorted grams, how often each occurs
    # Per order: sorted grams without their last token, how often each occurs, number of its
    # successors.
    histories: list
    tokenizer: object

    @classmethod
    def fit(cls, corpus, tokenizer, part="all", example="line"):
        """Count the n-grams of a part of a text: 6-grams for K < 400 (characters), else 3-grams.

        Raises ValueError for a part without text.
        """
        K = len(tokenizer)
        order = 6 if K < 400 else 3
        words = set()
        texts = []
        n_chars = 0
        for piece in read_part(corpus, part, example):
            words.update(piece.text.split())
            if n_chars < REFERENCE_CHARS:
                texts.append(piece.text)
                n_chars += len(piece.text)
        if not words:
            raise ValueError(f"{corpus} has no text to compare samples with")
        stream = _stream(tokenizer.encode_all(texts), K, order)
        is_token = stream[order - 1 :] < K  # an n-gram ends in a token, not in a mark
        counts, histories = [], []
        for n in range(1, order + 1):
            gram, count = np.unique(_grams(stream, n, K)[order - n :][is_token], return_counts=True)
            history, first = np.unique(gram // (K + 1), return_index=True)
            counts.append((gram, count))
            n_successors = np.diff(np.append(first, len(gram)))
            histories.append((history, np.add.reduceat(count, first), n_successors))
        return cls(words, counts, histories, tokenizer)

    @cached_property
    def cells(self):
        """Sort n-grams, n = order, into cells: sorted grams, the cell of each, shares of cells.

        The N_COMMON commonest have a cell each, the others one for 1, 2 to 3, 4 to 7, ... times in
        the training text; those never seen have cell 0. An n-gram of the training text does not
        count itself, so that other text of this kind has the same shares.
        """
        gram, count = self.counts[-1]
        cell, among_others = (np.frexp(n)[1] for n in (count, count - 1))  # 0, 1, 2, 2, 3, ...
        common = np.argsort(count, kind="stable")[-N_COMMON:]
        cell[common] = among_others[common] = cell.max() + 1 + np.arange(len(common))
        return gram, cell, np.bincount(among_others, count) / count.sum()

    def find_cells(self, text):
        """Find the cells of the n-grams of a text -> (n_tokens,)."""
        K, n, (gram, cell, _) = len(self.tokenizer), len(self.counts), self.cells
        stream = _stream([self.tokenizer.encode(text)], K, n)
        grams = _grams(stream[: len(stream) - (n - 1)], n, K)  # each ends in a token, not in a mark
        return _look_up(grams, gram, cell)

    def divergence(self, cells):
        """Compare the shares p of cells in texts with q, those in the training text -> bits.

            H((p + q) / 2) - (H(p) + H(q)) / 2,  0 (equal) to 1 (nothing in common)

        Jensen-Shannon [Lin 1991, eq. 4.1]. cells: those of all texts, one after the other. If each
        n-gram were its own cell, few texts would seem best at a low temperature.
        """
        *_, q = self.cells
        p = np.bincount(cells, minlength=len(q)) / max(1, len(cells))
        return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2

    def nats(self, text):
        """Compute -log P of a text, interpolated as by Witten and Bell -> nats, number of tokens.

            p_n = (count + n_successors p_{n-1}) / (count of history + n_successors),  p_0 = 1 / K

        A history that the training text does not have changes nothing: p_n = p_{n-1}.
        """
        K, order = len(self.tokenizer), len(self.counts)
        stream = _stream([self.tokenizer.encode(text)], K, order)[: -(order - 1) or None]
        if len(stream) < order:
            return 0.0, 0
        p = np.full(len(stream) - order + 1, 1 / K)
        for n in range(1, order + 1):
            gram = _grams(stream, n, K)[order - n :]
            histories, totals, n_successors = self.histories[n - 1]
            count = _look_up(gram, *self.counts[n - 1])
            history = gram // (K + 1)
            total = _look_up(history, histories, totals)
            s = _look_up(history, histories, n_successors)
            p = np.where(total > 0, (count + s * p) / np.maximum(1, total + s), p)
        return -np.log(p).sum(), len(p)


def _stream(texts, K, order):
    """Join the ids of texts into one stream (N,)."""
    marks = np.full(order - 1, K)
    parts = [part for ids in texts for part in (marks, ids)]
    return np.concatenate([*parts, marks]).astype(np.int64)


def _grams(stream, n, K):
    """List the n-grams of a stream (N,) -> (N - n + 1,). Raises ValueError beyond int64."""
    if (K + 1) ** n >= 2**63:
        raise ValueError(f"a vocabulary of {K} is too large for {n}-grams")
    grams = np.zeros(len(stream) - n + 1, dtype=np.int64)
    for i in range(n):
        grams = grams * (K + 1) + stream[i : len(stream) - n + 1 + i]
    return grams


def _look_up(query, grams, values):
    """Look up the value of each gram of `query` in the sorted `grams`; 0 where it is missing."""
    index = np.minimum(np.searchsorted(grams, query), len(grams) - 1)
    return np.where(grams[index] == query, values[index], 0)


# ---------------------------------------------------------------- figures


def _entropy(share):
    """Compute the entropy of shares (n,) -> bits."""
    share = share[share > 0]
    return -(share * np.log2(share)).sum()


def _measure(measured, reference):
    """Compute the figures of texts -> {figure: value}.

    measured: of each text, the text, its words, how many of these are in the training text, its
    cells, its nats under the n-gram model, its number of tokens.
    """
    texts, words, n_known, cells, nats, n_tokens = zip(*measured, strict=True)
    counts = np.array(list(Counter(chain.from_iterable(words)).values()) or [1])
    joined = "\n".join(texts)
    n_bits = 8 * len(bz2.compress(joined.encode()))
    return {
        "known words": sum(n_known) / max(1, sum(map(len, words))),
        "word entropy (bits)": _entropy(counts / counts.sum()),
        "compressed (bits per character)": n_bits / max(1, len(joined)),
        "n-gram perplexity": math.exp(sum(nats) / max(1, sum(n_tokens))),
        "n-gram divergence (bits)": reference.divergence(np.concatenate(cells)),
    }


def figures(texts, reference, seed=0):
    """Measure texts -> {figure: (value, low, high)}, 95 % intervals by the bootstrap over texts.

    The interval is centred on the value itself. Quantiles of the resamples would be too low: a
    resample repeats texts, so it is less diverse.
    """
    measured = []
    for text in texts:
        words = text.split()
        n_known = sum(word in reference.words for word in words)
        measured.append((text, words, n_known, reference.find_cells(text), *reference.nats(text)))
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(texts), size=(N_RESAMPLES, len(texts)))
    resamples = [_measure([measured[i] for i in indices], reference) for indices in chosen]
    result = {}
    for name, value in _measure(measured, reference).items():
        margin = 1.96 * np.std([resample[name] for resample in resamples])
        result[name] = (float(value), float(value - margin), float(value + margin))
    return result


def choose_texts(tokens, window, n, seed):
    """Choose random windows of a text -> up to n texts, their lengths in tokens.

    Raises ValueError if all are too short.
    """
    plan = plan_validation(tokens, window, n)
    given = 1 + bool(tokens.tokenizer.labels)  # bos, and a label
    long_enough = np.flatnonzero(plan.lengths > given)
    if not len(long_enough):
        raise ValueError("this text is too short to compare with samples: give another one")
    chosen = np.random.default_rng(seed).permutation(long_enough)[:n]
    starts, lengths = plan.starts[chosen].tolist(), plan.lengths[chosen].tolist()
    pairs = zip(starts, lengths, strict=True)
    return [tokens.tokenizer.decode(tokens.ids[i : i + n].tolist()) for i, n in pairs], lengths


def table(samples):
    """Lay out {name: {figure: (value, low, high)}} -> lines of text."""
    figure_names = next(iter(samples.values()))
    lines = ["", " " * 24 + "".join(f"{name:>33}" for name in figure_names)]
    for name, values in samples.items():
        cells = [f"{v:15.3f} [{low:6.3f}, {high:6.3f}]" for v, low, high in values.values()]
        lines.append(f"{name:24}" + "".join(cells))
    return lines
