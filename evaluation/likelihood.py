"""The exact likelihood of text under `commit`, and by the chain rule in other orders.

    windows   list of n     ids of each window, scored by itself, given its length
    u         (B, L + 1)    uniform: the first decides how many tokens are unknown, the others
                            a random order
    nats      (n,) float64  -log P of each window
    n_scored  (n,) float64  tokens of each window that are neither bos nor given
"""

import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import bfn
from common import parallel
from common.noise import Draws, mix_seed, uniform
from common.precision import network_of
from data import pad
from evaluation.bounds import add_up_batches, nothing_given
from model import rows_at_once

ANY_ORDER_DRAWS = 8  # per window
SHARES = 0.15, 0.3, 0.5, 0.75, 1.0  # of a text that are unknown
CHUNK_TOKENS = 2048  # every figure is computed of so many tokens before the next ones are read


# ---------------------------------------------------------------- figures of a batch: (B,) nats


def leftmost(score, open_mask, n):
    """Choose the first n (B,) of the positions `open_mask` (B, L), whatever their score."""
    return open_mask & (open_mask.cumsum(1) <= n[:, None])


def lowest(u, open_mask, n):
    """Choose n (B,) of the positions `open_mask` (B, L): those of the lowest u (B, L)."""
    rank = u.masked_fill(~open_mask, torch.inf).argsort(1).argsort(1)
    return open_mask & (rank < n[:, None])


def exact(network, ids, cond_mask, u, config, choose=bfn.spread_out, calls=None):
    """Compute -log P of each row with one call per token, or `calls` -> (B,) nats.

    choose: which positions to fill, see `bfn.spread_out`; None is a random order, by u[:, 1:].
    """
    calls = calls or ids.shape[1]
    choose = choose or (lambda score, *rest: lowest(u[:, 1:], *rest))
    log_p = bfn.log_likelihood(network, ids, cond_mask, config.s1, config.K, calls, choose)
    return -log_p.double().sum(1)


def spread(network, ids, cond_mask, u, config):
    """Compute the standard deviation of -log P between four random orders of a row -> (B,) nats.

    A consistent network has none: -log P by the chain rule does not depend on the order. Per token,
    it is smaller for longer rows.
    """
    # Multiples of a uniform number are uniform too, and hardly depend on each other.
    orders = ((u.double() * prime).frac() for prime in (1, 1009, 2003, 3001))
    nats = [exact(network, ids, cond_mask, order, config, choose=None) for order in orders]
    return torch.stack(nats).std(0)


def any_order(network, ids, cond_mask, u, config, n_draws=ANY_ORDER_DRAWS):
    """Estimate the bound over all orders: the cross-entropy of m unknown tokens over their share.

    m is uniform in 1, ..., number of open positions. The mean is -log P by the chain rule, averaged
    over all orders [Uria et al. 2014, "A deep and tractable density estimator"], which is at least
    -log of the average P -> (B,) nats.
    """
    n_open = (~cond_mask).sum(1)
    nats = 0.0
    for i in range(n_draws):
        m = 1 + ((u[:, 0] + i / n_draws).frac() * n_open).long()
        unknown = lowest(u[:, 1:], ~cond_mask, m)
        log_p = bfn.log_likelihood(network, ids, ~unknown, config.s1, config.K, calls=1)
        nats -= log_p.double().sum(1) * n_open / m / n_draws
    return nats


def gap(network, ids, cond_mask, u, config, size, from_left=False):
    """Compute -log P of a stretch of `size` tokens, one of a row at random, times tokens / size.

    The stretch is filled in the sampler's order with all other tokens given; from_left: from left
    to right, with only the tokens before it given, as a causal model must. The mean per token of
    the text is that of a hidden token -> (B,) nats.
    """
    n_open = (~cond_mask).sum(1)
    size = n_open.clamp(1, size)
    begin = (u[:, 0] * (n_open - size + 1)).long()
    number = (~cond_mask).cumsum(1) - 1  # counts the open positions of a row from 0
    before = number < begin[:, None]
    hidden = ~cond_mask & ~before & (number < (begin + size)[:, None])
    if not from_left:
        nats = exact(network, ids, ~hidden, u, config, calls=int(size.max()))
        return nats * n_open / size
    nothing = torch.zeros(*ids.shape, config.K, device=ids.device)
    nats = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    for i in range(int(size.max())):
        known = cond_mask | (number < (begin + i)[:, None])
        log_p = bfn.predict(network, nothing.softmax(-1), nothing[..., 0], ids, known)
        this = hidden & (number == (begin + i)[:, None])
        nats += (bfn.cross_entropy(log_p, ids).double() * this).sum(1)
    return nats * n_open / size


def share_unknown(network, ids, cond_mask, u, config, share):
    """Compute -log P of a random share of each row's tokens, given the others, over that share.

    It takes the sampler's order and its default number of calls -> (B,) nats.
    """
    n_open = (~cond_mask).sum(1)
    m = (share * n_open.double()).ceil().long().clamp(min=1)
    hidden = lowest(u[:, 1:], ~cond_mask, m)
    return exact(network, ids, ~hidden, u, config, calls=bfn.Controls.steps) * n_open / m


COMMIT = {"exact": partial(exact, calls=bfn.Controls.steps)}  # as the default sampler fills
ORDERS = {  # by the flag --order: the name of the figure, and how it is computed
    "sampler": ("exact, a call per token", exact),
    "left": ("left to right", partial(exact, choose=leftmost)),
    "random": ("random order", partial(exact, choose=None)),
    "spread": ("spread over orders", spread),
    "any": ("any order (bound)", any_order),
}


def figures_of(calls=(), orders=(), gaps=()):
    """Name the figures of numbers of calls, of ORDERS, and of gaps of n tokens.

    -> {name: function}. With gaps, also the figures by the share that is unknown.
    """
    figures = {f"exact, {n} call{'s' if n > 1 else ''}": partial(exact, calls=n) for n in calls}
    figures |= dict(ORDERS[order] for order in orders)
    for n in gaps:
        figures[f"gap of {n}"] = partial(gap, size=n)
        figures[f"{n} from the left"] = partial(gap, size=n, from_left=True)
    shares = SHARES if gaps else ()
    return figures | {f"{s:.0%} unknown": partial(share_unknown, share=s) for s in shares}


# ---------------------------------------------------------------- a text


@dataclass
class Likelihoods:
    """What each figure says of the windows that were read."""

    nats: dict  # {name of the figure: (n,)}
    n_scored: np.ndarray  # (n,)


@torch.no_grad()
def score(model, windows, bos, functions, work, seed=0, given=nothing_given):
    """Compute figures (see `figures_of`) of windows, a list of arrays of ids -> Likelihoods.

    model: any callable (theta, t, segment_ids) -> logits whose `config` has K, s1 and d_model.
    given: function of segment_ids (B, L) that tells what is given, besides bos. work: see
    `bounds.Work`; at least one chunk is read. Raises ValueError if no token is left to score.
    """
    n = len(windows)
    longest = max(map(len, windows))
    per_process = math.ceil(n / parallel.size())
    fitting = min(max(1, CHUNK_TOKENS // longest), rows_at_once(longest, model.config, work.device))
    size = min(fitting, per_process)
    chunks = [range(i, min(i + size, n)) for i in range(0, n, size)]
    results = torch.zeros(1 + len(functions), n, dtype=torch.float64)  # n_scored, then the figures
    deadline = time.perf_counter() + work.seconds

    def add(rows):
        chunk = slice(rows.start, rows.stop)
        ids, segment_ids = pad([window.tolist() for window in windows[chunk]], work.device)
        cond_mask = (segment_ids == 0) | (ids == bos) | given(segment_ids)
        seeds = [mix_seed(seed, "likelihood", i) for i in rows]
        keys = Draws.seeded(seeds, [longest + 1] * len(rows), work.device).keys
        inputs = ids, cond_mask, uniform(keys)[:, : ids.shape[1] + 1], model.config
        network = network_of(model, segment_ids)
        figures = (function(network, *inputs) for function in functions.values())
        results[:, chunk] = torch.stack([(~cond_mask).sum(1), *figures]).cpu()
        bar.update(len(rows))

    look = dict(unit="window", desc="likelihood", disable=None if work.progress else True)
    with tqdm(total=per_process, **look) as bar:
        n_chunks = add_up_batches(chunks, add, [results], work, deadline, n_ahead=1)
    n_scored, *nats = results[:, : chunks[n_chunks - 1].stop].numpy()
    if not n_scored.sum():
        raise ValueError("nothing of this text is left to score: give less of it")
    return Likelihoods(dict(zip(functions, nats, strict=True)), n_scored)
