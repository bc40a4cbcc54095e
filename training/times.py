"""Training times: how clear the evidence of each token is.

    segment_ids  (B, L)  int64    segment of each position, numbered in order within its row
    seen         (B, L)  int8     what the network sees of a token, see data.draw_seen
    t, weight    (B, L)  float32  times in [0, 1], and the weight of the loss at each
"""

import math

import torch

from common.noise import GOLDEN
from data import HIDDEN, OWN
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


def draw_times(segment_ids, seen):
    """Draw the times of a batch -> t (B, L), weight (B, L).

    Own times are (1 - cos(pi v)) / 2, v ~ U(0, 1): mostly near 0 or 1, so that clear words stand
    next to unclear ones. What is HIDDEN has time 0, and the weight that makes a segment count as if
    all of it were hidden, as in the bound of masked diffusion [Sahoo et al. 2024, "Simple and
    effective masked diffusion language models"].
    """
    j = segment_numbers(segment_ids)
    own_t = (1 - torch.cos(math.pi * torch.rand(j.shape, device=j.device))) / 2
    hidden = seen == HIDDEN
    t = torch.where(seen == OWN, own_t, draw_evenly(j)).masked_fill(hidden, 0.0)
    counted = torch.stack([torch.ones_like(t), hidden.float()]).flatten(1)
    sizes = counted.new_zeros(2, j.numel() + 1)
    n_tokens, n_hidden = sizes.scatter_add_(1, j.flatten().expand(2, -1), counted)[:, j]
    return t, torch.where(hidden, n_tokens / n_hidden.clamp(min=1), 1.0)
