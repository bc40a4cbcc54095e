"""Training times: one per text or per position, spread evenly over the batch or learned.

    segment_ids  (B, L)     segment of each position, numbered in order within its row
    t, weight    (B, L)     float32: times in [0, 1], and the weight of the loss at each
    curve        (N_BINS,)  mean square of the loss by time
"""

import math

import torch

from common.noise import GOLDEN
from model import segment_starts

N_BINS = 64
MEMORY = 0.99  # the curve is an average over about 1 / (1 - 0.99) steps
UNIFORM_SHARE = 0.3  # in the learned density: no time is forgotten, no weight is above 1 / 0.3


def segment_numbers(segment_ids):
    """Number the segments of a batch from 1 in reading order: (B, L) -> (B, L) int64."""
    return segment_starts(segment_ids).flatten().cumsum(0).view_as(segment_ids)


def draw_evenly(segment_ids, kind="stratified"):
    """Draw u ~ U(0, 1) for each segment: (B, L) -> (B, L) float32.

    kind "uniform": independent. "stratified": the j-th segment gets frac(u + j * golden ratio), so
    that each is uniform and together they are spread evenly. This needs no count of the segments.
    """
    j = segment_numbers(segment_ids)
    device = j.device
    if kind == "uniform":
        return torch.rand(j.numel() + 1, device=device)[j]
    return (torch.rand((), device=device, dtype=torch.float64) + j.double() * GOLDEN).frac().float()


def draw_by_position(segment_ids, share):
    """Choose a random `share` of the segments -> (B, L) bool, and a time per position -> (B, L).

    The times (1 - cos(pi v)) / 2 with v ~ U(0, 1) are mostly near 0 or 1: clear words stand next to
    unknown ones.
    """
    j = segment_numbers(segment_ids)
    chosen = torch.rand(j.numel() + 1, device=j.device)[j] < share
    return chosen, (1 - torch.cos(math.pi * torch.rand(j.shape, device=j.device))) / 2


def quantiles(u, density):
    """Turn uniform numbers u into numbers of a density on [0, 1] -> as u, and the bin of each.

    density (n_bins,) is constant in each of n_bins equal bins and need not be normalised. This is
    the inverse of its distribution function, so it increases with u.
    """
    # Distribution function at the bins' edges.
    Q = torch.cat([density.new_zeros(1), density.cumsum(0) / density.sum()])
    i = (torch.searchsorted(Q, u, right=True) - 1).clamp(0, len(density) - 1)
    return ((i + (u - Q[i]) / (Q[i + 1] - Q[i])) / len(density)).clamp(0, 1), i


class Times:
    """Draw training times, and learn at which times the loss is large.

    Call `draw`, then `learn` with the losses, then `fold` once per step. kind "learned" draws t
    from a density q(t) that grows with the root mean square loss, and weights losses by 1 / q(t):
    importance sampling changes the variance of the loss but not its mean. In a random
    `position_share` of the segments every position has its own time, and weight 1: their losses do
    not estimate the bound.
    """

    def __init__(self, kind, position_share, device="cpu"):
        self.kind = kind
        self.position_share = position_share
        self.curve = torch.ones(N_BINS, device=device)
        self.history = []  # (step, curve as a list) at each validation, to be looked at
        # Squared losses and numbers of draws in this step.
        self.sums = torch.zeros(2, N_BINS, device=device)

    def density(self):
        """The density q of the learned times, constant in each bin: (N_BINS,), mean 1."""
        q = self.curve.sqrt()
        return UNIFORM_SHARE + (1 - UNIFORM_SHARE) * q / q.mean().clamp(min=1e-12)

    def draw(self, segment_ids):
        """segment_ids (B, L) -> t (B, L), weight (B, L)."""
        t = draw_evenly(segment_ids, "uniform" if self.kind == "uniform" else "stratified")
        weight = torch.ones_like(t)
        if self.kind == "learned":
            q = self.density()
            t, i = quantiles(t, q)
            weight = q.mean() / q[i]
        if self.position_share:
            by_position, own_t = draw_by_position(segment_ids, self.position_share)
            t, weight = torch.where(by_position, own_t, t), weight.masked_fill(by_position, 1.0)
        return t, weight

    def learn(self, t, loss, mask):
        """Add losses (B, L), before weighting, at times t (B, L) where mask (B, L) is True."""
        i = (t * N_BINS).long().clamp(max=N_BINS - 1).flatten()
        # Added as a whole, as other processes' batches are: the same rounding.
        of_batch = torch.zeros_like(self.sums)
        of_batch[0].scatter_add_(0, i, (loss.square() * mask).flatten())
        of_batch[1].scatter_add_(0, i, mask.float().flatten())
        self.sums += of_batch

    def remember(self, step):
        """Keep the curve of a step."""
        self.history.append((step, self.curve.tolist()))

    def fold(self):
        """Move the curve towards this step's finite mean squares, in bins that have any."""
        squares, count = self.sums
        rate = (1 - MEMORY) * (count > 0) * squares.isfinite()
        self.curve += rate * ((squares / count.clamp(min=1)).nan_to_num(0, 0, 0) - self.curve)
        self.sums.zero_()
