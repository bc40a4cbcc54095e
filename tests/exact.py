"""Exact networks, which are what perfect training would give: of a small joint, of a grammar."""

from types import SimpleNamespace

import numpy as np
import torch

from text import cache, toy


def random_joint(K=4, L=3, seed=0, spread=2.0):
    """A random distribution, more peaked for a larger `spread` -> sequences, probabilities.

    (K^L, L), (K^L,)
    """
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.cartesian_prod(*[torch.arange(K)] * L)
    return sequences, (spread * torch.randn(K**L, generator=generator)).softmax(0)


def vocabulary():
    """All words of the built-in language, sorted."""
    symbols = {word for rules in toy.GRAMMAR.values() for _, body in rules for word in body}
    return sorted(symbols - toy.GRAMMAR.keys())


def entropy(probabilities):
    return -(probabilities * probabilities.log()).sum().item()


class ExactNetwork:
    """p_d(k) proportional to the sum over sequences x with x_d = k of P(x) prod_j theta_j(x_j)."""

    def __init__(self, sequences, probabilities):
        K = int(sequences.max()) + 1
        self.sequences, self.log_P = sequences, probabilities.log()
        self.one_hot = torch.nn.functional.one_hot(sequences, K).float()  # (K^L, L, K)

    def __call__(self, theta, t):
        log_theta = theta.clamp(min=1e-37).log()  # (B, L, K)
        joint = self.log_P + torch.einsum("blk,nlk->bn", log_theta, self.one_hot)
        return torch.einsum("bn,nlk->blk", joint.softmax(-1), self.one_hot).log()


def draw(sequences, probabilities, n, seed=0):
    """n independent sequences (n, L)."""
    generator = torch.Generator().manual_seed(seed)
    return sequences[torch.multinomial(probabilities, n, replacement=True, generator=generator)]


class ExactGrammar:
    """The built-in language, of which theta (B, L, V) is over `vocabulary()`.

    spans[b, i, j] is the probability of a symbol to become the words i to j - 1, under theta, so
    that a sequence of symbols is a product of matrices. The derivative of the log of the whole, by
    log theta, is the posterior of each word.
    """

    def __init__(self):
        self.words = {word: k for k, word in enumerate(vocabulary())}

    def spans(self, symbol, theta, known):
        if symbol in known:
            return known[symbol]
        if symbol in self.words:
            known[symbol] = torch.diag_embed(theta[..., self.words[symbol]], 1)
            return known[symbol]
        total = 0.0
        for weight, body in toy.GRAMMAR[symbol]:
            product = torch.eye(theta.shape[1] + 1, dtype=theta.dtype).expand(len(theta), -1, -1)
            for part in body:
                product = product @ self.spans(part, theta, known)
            total = total + weight * product
        known[symbol] = total
        return total

    @torch.enable_grad()
    def __call__(self, theta, t):
        theta = theta.detach().double().requires_grad_()
        whole = self.spans("S", theta, {})[:, 0, -1]
        (slope,) = torch.autograd.grad(whole.log().sum(), theta)
        return (theta * slope).detach().clamp(min=1e-300).log()


def exact_model(s1):
    """The exact network of `random_joint` as a model that `score` takes."""
    network = ExactNetwork(*random_joint())

    def model(theta, t, segment_ids):
        return network(theta, t)

    model.config = SimpleNamespace(K=4, d_model=1, s1=s1)
    return model


def uniform_model(K, s1=2.0):
    """A model that predicts every token with probability 1 / K."""

    def model(theta, t, segment_ids):
        return torch.zeros_like(theta)

    model.config = SimpleNamespace(K=K, d_model=1, s1=s1)
    return model


def tokens_of(ids):
    """A text in which each row is a document, without bos and eos, of one character and one byte
    per token.
    """
    B, L = ids.shape
    offsets, n, unmarked = np.arange(B + 1) * L, ids.numel(), SimpleNamespace(bos=-1)
    return cache.Tokens(ids.numpy().ravel(), offsets, n, n, 0, "test", unmarked)
