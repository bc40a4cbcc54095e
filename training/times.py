"""Training times: how much the network sees of each token that it predicts.

    segment_ids  (B, L)  int64    segment of each position, numbered in order within its row
    cond_mask    (B, L)  bool     True = given
    t, weight    (B, L)  float32  times in [0, 1], and the weight of the loss at each

A segment is of one of three kinds. Its positions share a time, as in the bound; or each has its
own; or all have time 0, so that what is not given is unknown, as in masked diffusion.
"""

import math

import torch

from common.noise import GOLDEN
from model import segment_starts


def segment_numbers(segment_ids):
    """Number the segments of a batch from 1 in reading order: (B, L) -> (B, L) int64."""
    return segment_starts(segment_ids).flatten().cumsum(0).view_as(segment_ids)


def draw_evenly(j):
    """Draw u ~ U(0, 1) for each segment, the same at all of its positions: j (B, L) -> (B, L).

    The j-th segment gets frac(u + j * golden ratio), so that each is uniform and together they are
    spread evenly. This needs no count of the segments.
    """
    u = torch.rand((), device=j.device, dtype=torch.float64)
    return (u + j.double() * GOLDEN).frac().float()


def choose(j, share):
    """Choose a random share of the segments whose numbers are j (B, L) -> (B, L) bool."""
    return torch.rand(j.numel() + 1, device=j.device)[j] < share


def draw_times(segment_ids, cond_mask, own_share=0.0, hidden_share=0.0):
    """Draw the times of a batch -> t (B, L), weight (B, L).

    own_share: of the segments, those whose positions have their own times (1 - cos(pi v)) / 2, v ~
    U(0, 1): mostly near 0 or 1, so that clear words stand next to unclear ones. hidden_share: those
    of time 0. Each of these counts as if all of its tokens were unknown, which makes its mean
    cross-entropy the bound of masked diffusion [Sahoo et al. 2024, "Simple and effective masked
    diffusion language models"].
    """
    j = segment_numbers(segment_ids)
    t = draw_evenly(j)
    own_t = (1 - torch.cos(math.pi * torch.rand(j.shape, device=j.device))) / 2
    t = torch.where(choose(j, own_share), own_t, t)
    hidden = choose(j, hidden_share)
    counts = torch.zeros(2, j.numel() + 1, device=j.device)
    counts[0].scatter_add_(0, j.flatten(), torch.ones_like(t).flatten())
    counts[1].scatter_add_(0, j.flatten(), (~cond_mask).float().flatten())
    n_tokens, n_unknown = counts[:, j]
    return t.masked_fill(hidden, 0.0), torch.where(hidden, n_tokens / n_unknown.clamp(min=1), 1.0)
