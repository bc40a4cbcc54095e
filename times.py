"""Training times: one for each text or each position, spread evenly over the batch, and drawn where the loss is.

segment_ids (B, L)     segment of each position, numbered in order within its row
t, weight   (B, L)     float32, times in [0, 1], and what their losses are to be multiplied by
curve       (N_BINS,)  mean square of the loss by time
"""

import math

import torch

from bfn import quantiles
from data import GOLDEN

N_BINS = 64
MEMORY = 0.99  # of the curve, a step
UNIFORM_SHARE = 0.3  # of the learned density: no time is forgotten, no weight is above 1 / 0.3


def segment_numbers(segment_ids):
    """Number the segments of a batch from 1 in reading order: (B, L) -> (B, L) int64."""
    first = torch.ones_like(segment_ids, dtype=torch.bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return first.flatten().cumsum(0).view_as(segment_ids)


def draw_evenly(segment_ids, kind="stratified"):
    """Draw u ~ U(0, 1) for each segment: (B, L) -> (B, L) float32.

    "stratified": the j-th segment takes frac(u + j * golden ratio): uniform for each, of low discrepancy together, and
    computed without knowing how many there are. "uniform": independent.
    """
    j, device = segment_numbers(segment_ids), segment_ids.device
    if kind == "uniform":
        return torch.rand(j.numel() + 1, device=device)[j]
    return (torch.rand((), device=device, dtype=torch.float64) + j.double() * GOLDEN).frac().float()


def draw_by_position(segment_ids, share):
    """Choose a random `share` of the segments -> (B, L) bool, and draw a time for every position -> (B, L).

    (1 - cos(pi v)) / 2 for v ~ U(0, 1) is more often near 0 or 1: clear words stand beside unknown ones.
    """
    j = segment_numbers(segment_ids)
    chosen = torch.rand(j.numel() + 1, device=j.device)[j] < share
    return chosen, (1 - torch.cos(math.pi * torch.rand(j.shape, device=j.device))) / 2


class Times:
    """Draws times, and learns where the loss is: `draw`, then `learn` from the losses, then `fold` once a step.

    kind "learned" draws t from the density q(t), in proportion to the root of the mean square loss at t and mixed with a
    uniform share, and divides losses by q(t): importance sampling, which changes the variance of the loss, not its mean.
    In a random `position_share` of the segments every position has a time of its own, whatever the kind, and weight 1:
    their losses are no estimate of the bound.
    """

    def __init__(self, kind, position_share, device="cpu"):
        self.kind, self.position_share = kind, position_share
        self.curve = torch.ones(N_BINS, device=device)
        self.sums = torch.zeros(2, N_BINS, device=device)  # of squared losses and of draws in this step

    def density(self):
        """q, constant in each bin, of mean 1: (N_BINS,)."""
        q = self.curve.sqrt()
        return UNIFORM_SHARE + (1 - UNIFORM_SHARE) * q / q.mean().clamp(min=1e-12)

    def draw(self, segment_ids):
        """segment_ids (B, L) -> t (B, L), weight (B, L)."""
        t = draw_evenly(segment_ids, "uniform" if self.kind == "uniform" else "stratified")
        weight = torch.ones_like(t)
        if self.kind == "learned":
            q = self.density()
            t, at = quantiles(t, q)
            weight = q.mean() / q[at]
        if self.position_share:
            apart, own = draw_by_position(segment_ids, self.position_share)
            t, weight = torch.where(apart, own, t), weight.masked_fill(apart, 1.0)
        return t, weight

    def learn(self, t, loss, mask):
        """Take in losses (B, L), before weighting, at times t (B, L) where mask (B, L) is True."""
        at = (t * N_BINS).long().clamp(max=N_BINS - 1).flatten()
        self.sums[0].scatter_add_(0, at, (loss.square() * mask).flatten())
        self.sums[1].scatter_add_(0, at, mask.float().flatten())

    def fold(self):
        """Move the curve towards the mean of this step's losses, in the bins that had any, all of them finite."""
        squares, count = self.sums
        rate = (1 - MEMORY) * (count > 0) * squares.isfinite()
        self.curve += rate * ((squares / count.clamp(min=1)).nan_to_num(0, 0, 0) - self.curve)
        self.sums.zero_()
