"""Lengths that fit a prompt: p(length | given tokens), by Bayes' rule from the network.

    p(template | given tokens)  is proportional to  p(template) P(given tokens | template)

A template is a prompt with a length, or with a size for each of its gaps. P is the chain rule over
the given tokens, from left to right, with everything else unknown.
"""

import numpy as np
import torch

import bfn
from model import rows_at_once
from prompts import MAX_CANDIDATES, pad

MAX_CALLS = 8  # network calls per template; longer prompts are read several tokens per call


@torch.no_grad()
def given_log_likelihood(model, tokenizer, templates):
    """Compute log P(given tokens | template) of each template, without bos -> (n,) float64, nats.

    Exact for up to MAX_CALLS given tokens; of more, those read in the same call count as
    independent.
    """
    device = next(model.parameters()).device
    batch_size = rows_at_once(max(map(len, templates)), model.config, device)
    parts = []
    for i in range(0, len(templates), batch_size):
        padded, segment_ids = pad(templates[i : i + batch_size], device)
        parts.append(batch_log_likelihood(model, padded, segment_ids, tokenizer.bos_id()))
    return torch.cat(parts).cpu()


def batch_log_likelihood(model, padded, segment_ids, bos_id):
    """Compute log P(given tokens | template) of one batch: padded, segment_ids (B, L) -> (B,)."""

    def network(theta, t):
        return model(theta, t, segment_ids)

    ids, t = padded.clamp(min=0), torch.zeros(padded.shape, device=padded.device)
    scored = (padded >= 0) & (segment_ids > 0) & (padded != bos_id)
    known = (padded >= 0) & ~scored  # bos and padding
    n_scored = scored.sum(1, keepdim=True)
    order = scored.cumsum(1) - 1  # 0, 1, 2, ... at the scored positions
    n_calls = n_scored.clamp(1, MAX_CALLS)
    theta = torch.full((*padded.shape, model.config.K), 1 / model.config.K, device=padded.device)
    total = torch.zeros(len(padded), dtype=torch.float64, device=padded.device)
    for call in range(n_calls.max().item()):
        now = scored & (order * n_calls // n_scored.clamp(min=1) == call)
        log_p = bfn.predict(network, theta, t, ids, known)
        total += (bfn.pick(log_p, ids) * now).double().sum(1)
        known = known | now
    return total


def fit_lengths(model, tokenizer, templates, weights):
    """Multiply the weights of a prompt's templates by P(given tokens | template) -> the same two.

    Of more than MAX_CANDIDATES templates, evenly spaced ones are read; log P of the others is
    interpolated over the length.
    """
    has_given = any(k >= 0 and k != tokenizer.bos_id() for k in templates[0])
    if len(templates) < 2 or not has_given:
        return templates, weights
    n_read = min(len(templates), MAX_CANDIDATES)
    read = np.linspace(0, len(templates) - 1, n_read).round().astype(int)
    log_p = given_log_likelihood(model, tokenizer, [templates[i] for i in read])
    log_p = np.interp(np.arange(len(templates)), read, log_p) + np.log(weights)
    return templates, np.exp(log_p - log_p.max()).tolist()
