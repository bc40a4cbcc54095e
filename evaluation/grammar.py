"""What a model of the built-in language knows, compared with its grammar."""

import math
from itertools import pairwise

import torch

import bfn
from common.precision import network_of
from data import pad
from evaluation import likelihood
from evaluation.bounds import Work
from text import toy


def hidden_word_nats(model, val, n=100):
    """Compute what a word costs, given all others, in n sentences -> nats: model, grammar."""
    rows, hidden, truth = [], [], 0.0
    for begin, end in pairwise(val.offsets[: n + 1]):
        ids = val.ids[begin:end].tolist()
        words = val.tokenizer.decode(ids).split()
        for d in range(len(words)):
            rows.append(ids)
            hidden.append([d + 1])  # after bos
            others = [*words[:d], None, *words[d + 1 :]]
            truth += math.log(toy.probability(others) / toy.probability(words))
    ids, segment_ids = pad(rows, next(model.parameters()).device)
    hidden = torch.tensor(hidden, device=ids.device)
    given = torch.ones_like(ids, dtype=torch.bool).scatter(1, hidden, False)
    network, config = network_of(model, segment_ids), model.config
    log_p = bfn.log_likelihood(network, ids, given, config.s1, config.K, calls=1)
    return -log_p.sum().item() / len(rows), truth / len(rows)


def excess_nats_per_token(model, val, n=400):
    """Compute what n sentences cost under commit more than the grammar -> nats per token.

    Both are exact likelihoods given the length, so the choice of sentences hardly matters.
    """
    sentences = [val.ids[begin:end] for begin, end in pairwise(val.offsets[: n + 1])]
    device = next(model.parameters()).device
    tokenizer = val.tokenizer
    scores = likelihood.score(model, sentences, tokenizer.bos, likelihood.COMMIT, Work(device))
    words = [tokenizer.decode(ids.tolist()).split() for ids in sentences]
    truth = sum(math.log(toy.lengths()[len(w)] / toy.probability(w)) for w in words)
    return (scores.nats["exact"].sum() - truth) / scores.n_scored.sum()
