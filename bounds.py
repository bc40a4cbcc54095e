"""A bound on -log P of a text, from random times and noise, with its errors.

The text is cut into N windows, which are packed into rows. One draw gives a time to every window and noise to every
position; the bound is the mean of R draws:

    index     (B, L)  int64    window of each position, counted through the text
    t         (R, N)  float64  time of each window
    loss      (R, N)  float64  integrand of L_inf (or of L_n), nats, summed over the window's scored tokens
    n_scored  (N,)    float64  scored tokens of each window: all but bos and what is given
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import bfn
import cache
import data
import parallel
from model import rows_at_once
from noise import GOLDEN, Draws, mix_seed

MAX_DRAWS = 64
TIME_BINS = 50
UNKNOWN_BITS = 9  # to spell a byte that the tokenizer does not know: 8 for the byte, 1 for whether another one follows

# ---------------------------------------------------------------- what is scored


def nothing_given(segment_ids):
    """Give nothing: segment_ids (B, L) -> (B, L) bool, all False."""
    return torch.zeros_like(segment_ids, dtype=torch.bool)


@dataclass(frozen=True)
class Text:
    """A text as windows in rows, and what of it is scored."""

    tokens: cache.Tokens
    plan: data.Plan
    row_length: int  # also the longest window
    bos_id: int  # -1 if the tokenizer has none
    given: object  # function: segment_ids (B, L) -> what is given, (B, L) bool

    @classmethod
    def planned(cls, tokens, row_length, bos_id, given=nothing_given, n_rows=math.inf):
        """Plan a text, or its first n_rows rows if it has more. Only as much of it is planned."""
        plan = data.plan_validation(tokens, row_length, n_rows)
        return cls(tokens, plan, row_length, bos_id, given).first_rows(min(plan.n_rows, n_rows))

    def first_rows(self, n_rows):
        """Cut a text to its first rows, whose windows come from all over the text."""
        starts, lengths, row_starts = self.plan.starts, self.plan.lengths, self.plan.row_starts
        n_windows = row_starts[n_rows]
        return replace(self, plan=data.Plan(starts[:n_windows], lengths[:n_windows], row_starts[: n_rows + 1]))

    @property
    def document(self):
        """Document of each window, counted through the text: (N,)."""
        return np.searchsorted(self.tokens.offsets, self.plan.starts, side="right") - 1

    def windows(self):
        """List the ids of each window -> N arrays."""
        ends = self.plan.starts + self.plan.lengths
        return [self.tokens.ids[start:end] for start, end in zip(self.plan.starts, ends, strict=True)]

    def read(self, rows):
        """Read a range of rows -> ids, segment_ids, cond_mask, index (window of each position), each (B, L).

            segment_ids  1 1 1 2 2 0      row_starts[row] = 7: the row holds windows 7 and 8
            index        7 7 7 8 8 7

        Padding gets the index of the row's first window; it is never scored.
        """
        ids, segment_ids = map(torch.as_tensor, data.gather_rows(self.tokens, self.plan, np.asarray(rows), self.row_length))
        cond_mask = ((ids == self.bos_id) | self.given(segment_ids)) & (segment_ids > 0)
        first = torch.as_tensor(self.plan.row_starts[rows.start : rows.stop])
        return ids, segment_ids, cond_mask, first[:, None] + (segment_ids - 1).clamp(min=0)


def n_scorable(tokens, bos_id):
    """Count the tokens of a whole text that are scored if nothing is given: all but bos."""
    return max(1, int(tokens.offsets[-1]) - (bos_id >= 0) * tokens.n_documents)


def unknown_nats_per_token(tokens, bos_id):
    """Compute what the bytes that the tokenizer does not know cost, an average over the whole text."""
    return UNKNOWN_BITS * math.log(2) * tokens.n_unknown_bytes / n_scorable(tokens, bos_id)


# ---------------------------------------------------------------- draws


def draw_times(n_windows, seed, n_steps=None):
    """Draw a time for each window w: t = frac(u + w * golden ratio), one u for the whole text -> (N,) float32.

    Each t is uniform and together they are spread evenly. For L_n, t is where one of the n_steps steps starts.
    """
    u = seed / 2**63  # seeds from `mix_seed` are uniform in [0, 2^63)
    t = (u + torch.arange(n_windows, dtype=torch.float64) * GOLDEN).frac().float()
    return (t * n_steps).long().clamp(max=n_steps - 1) / n_steps if n_steps else t


@torch.no_grad()
def losses_at(model, ids, segment_ids, cond_mask, t, noise, n_steps=None):
    """Compute the integrand of L_inf (or L_n) at t, the output's cross-entropy, and a draw of L_rec -> three (B, L), nats."""
    K, s1 = model.config.K, model.config.s1
    network = partial(model, segment_ids=segment_ids)
    log_p = bfn.predict_noisy(network, ids, t, cond_mask, s1, K, noise.normal(K))
    if n_steps:
        i = (t * n_steps).round().long() + 1  # t = (i - 1) / n_steps
        loss = bfn.n_step_error(log_p, ids, i, n_steps, s1, noise.normal(K))
    else:
        loss = bfn.squared_error_loss(log_p, ids, t, s1)
    return loss, bfn.cross_entropy(log_p, ids), bfn.reconstruction_loss(network, ids, cond_mask, s1, K, noise.normal(K))


class BoundBar(tqdm):
    """A progress bar that shows the bound so far, nats per token."""

    nats = n_scored = unknown = 0.0  # unknown: what unknown text adds, nats per token

    def __init__(self, **options):
        super().__init__(desc="evaluating", unit="batch", **options)

    def add(self, nats, n_scored):
        """Count one more batch."""
        self.nats += nats
        self.n_scored += n_scored
        bound = self.nats / max(1, self.n_scored) + self.unknown
        self.set_postfix_str(f"bound {bound:.3f} nats/token", refresh=False)  # update() shows it when it is time to
        self.update()


def score_once(model, text, batches, device, n_steps, seed, bar, interrupts=(), deadline=math.inf):
    """Make one draw -> (t, loss, cross-entropy, reconstruction loss, number of scored tokens), number of complete rows.

    Each (N,) float64, all but t sums over the scored tokens of each window. A row's noise follows from the seed and the
    row's number, so the batch size does not change it. It stops after a batch if `interrupts` is no longer empty, or after
    the `deadline` of time.perf_counter().
    """
    t = draw_times(len(text.plan.starts), seed, n_steps)
    sums, is_read = torch.zeros(4, len(t), dtype=torch.float64), torch.zeros(len(batches), dtype=torch.float64)
    for i in parallel.share(range(len(batches))):
        rows = batches[i]
        ids, segment_ids, cond_mask, index = text.read(rows)
        noise = Draws.seeded([mix_seed(seed, row) for row in rows], [text.row_length] * len(rows), device)
        inputs = (x.to(device) for x in (ids, segment_ids, cond_mask, t[index]))
        losses = losses_at(model, *inputs, noise, n_steps)
        scored = (segment_ids > 0) & ~cond_mask
        values = torch.stack([*(loss.cpu().double() for loss in losses), torch.ones(ids.shape, dtype=torch.float64)])
        values = values[:, scored]
        sums.index_add_(1, index[scored], values)
        bar.add(values[0].sum().item() + values[2].sum().item(), values.shape[1])
        is_read[i] = 1
        if interrupts or time.perf_counter() > deadline:
            break
    parallel.add_up([sums, is_read], patient=True)
    n_rows = batches[int(is_read.cumprod(0).sum()) - 1].stop  # processes stop at different batches
    n_windows = text.plan.row_starts[n_rows]
    return (t[:n_windows].double().numpy(), *sums[:, :n_windows].numpy()), n_rows


@dataclass
class Scores:
    """R draws for the N windows of a text."""

    t: np.ndarray  # (R, N)
    loss: np.ndarray  # (R, N) nats
    cross_entropy: np.ndarray  # (R, N) of the output at t, nats
    reconstruction: np.ndarray  # (R, N) nats
    n_scored: np.ndarray  # (N,) tokens
    document: np.ndarray  # (N,) which document of the text a window belongs to
    n_steps: int | None  # None for the continuous-time loss
    text: Text  # only the rows that were scored
    partial: bool = False  # stopped by Ctrl-C

    @classmethod
    def of(cls, draws, text, n_steps):
        """Stack the draws of `score_once`. Raises ValueError if they scored no token."""
        t, loss, cross_entropy, reconstruction, n_scored = map(np.stack, zip(*draws, strict=True))
        if n_scored[0].sum() == 0:
            raise ValueError("nothing of this text is left to score: give less of it")
        return cls(t, loss, cross_entropy, reconstruction, n_scored[0], text.document, n_steps, text)

    @property
    def share(self):
        """Share of the text's tokens in the rows that were scored."""
        return float(self.text.plan.lengths.sum() / self.text.tokens.offsets[-1])

    @property
    def nats_per_token(self):
        """L_inf (or L_n) and L_rec, nats per scored token."""
        n = self.n_scored.sum()
        return self.loss.mean(0).sum() / n, self.reconstruction.mean(0).sum() / n

    def by_time(self, n_bins=TIME_BINS):
        """Average over bins of time -> bin of each draw (R, N), loss and cross-entropy in nats per token, each (n_bins,).

        A curve is nan in a bin without draws. L_n has at most one bin per step.
        """
        n_bins = min(n_bins, self.n_steps or n_bins)
        index = np.minimum((self.t * n_bins + 1e-4).astype(int), n_bins - 1)  # the steps of L_n start at the bins' edges

        def total(x):
            return np.bincount(index.ravel(), np.broadcast_to(x, index.shape).ravel(), n_bins)

        with np.errstate(invalid="ignore"):
            return index, *(total(x) / total(self.n_scored) for x in (self.loss, self.cross_entropy))

    def residuals(self):
        """Subtract what t explains, the mean loss by time -> residuals (R, N), correction of their variance.

        Times are spread evenly, so what only follows from t adds no error. The correction n / (n - n_bins) is for fitting
        the curve to the same n draws.
        """
        n_draws = self.loss.size
        n_bins = int(np.clip(n_draws // 20, 1, TIME_BINS))
        index, curve, _ = self.by_time(n_bins)
        return self.loss - self.n_scored * np.nan_to_num(curve)[index], n_draws / max(1, n_draws - len(curve))

    def monte_carlo_variance(self):
        """Variance of the whole text's bound over noise and times, nats^2. nan for a single draw."""
        if len(self.loss) < 2:
            return math.nan
        residuals, correction = self.residuals()
        variance = correction * residuals.var(0, ddof=1) + self.reconstruction.var(0, ddof=1)
        return variance.sum() / len(self.loss)

    def monte_carlo_error(self):
        """Standard error of the bound from noise and times, nats per token."""
        return math.sqrt(self.monte_carlo_variance()) / self.n_scored.sum()

    def text_error(self):
        """Standard error of the bound from the choice of text, clustered by document -> nats per token, n_clusters.

        If the text is one document, its windows are the clusters. The Monte-Carlo variance is subtracted. nan if nothing
        is left of the variance, or for a single cluster.
        """
        excess = self.residuals()[0].mean(0) + self.reconstruction.mean(0) - self.n_scored * self.nats_per_token[1]
        return clustered_error(excess, self.n_scored, self.document, np.nan_to_num(self.monte_carlo_variance()))


def clustered_error(excess, n_scored, document, noise_variance=0.0):
    """Standard error per token from what windows cost more than the mean, clustered by document -> error, n_clusters.

    excess, n_scored, document: (N,); noise_variance of their sum is not the text's. See `Scores.text_error`.
    """
    several = len(np.unique(document[n_scored > 0])) > 1
    cluster = document if several else np.arange(len(n_scored))
    excess = np.bincount(cluster, excess)[np.bincount(cluster, n_scored) > 0]
    n_clusters = len(excess)
    if n_clusters < 2:
        return math.nan, n_clusters
    variance = np.square(excess).sum() * n_clusters / (n_clusters - 1) - noise_variance
    return (math.sqrt(variance) / n_scored.sum() if variance > 0 else math.nan), n_clusters


def draws_needed(scores, error):
    """Estimate how many draws reach a Monte-Carlo error in nats per token: it falls with the root of their number."""
    n_draws, ratio = len(scores.loss), scores.monte_carlo_error() / error
    return math.ceil(min(MAX_DRAWS, max(n_draws + 1, n_draws * min(ratio, MAX_DRAWS) ** 2))) if ratio > 1 else n_draws


def seconds_per_row(model, text, device, n_steps):
    """Read a text as one batch twice, the first time as a warm-up -> time of the second reading, seconds per row."""
    for _ in range(2):
        start = time.perf_counter()
        score_once(model, text, [range(text.plan.n_rows)], device, n_steps, 0, BoundBar(disable=True))
    return (time.perf_counter() - start) / text.plan.n_rows


def rows_in_time(model, sample, n_rows, device, n_steps, seconds):
    """Choose how many of n_rows rows all processes score within some seconds, by the speed at a `sample`, a Text -> int."""
    speed = seconds_per_row(model, sample, device, n_steps)
    return parallel.from_first(int(min(n_rows, max(1, seconds // speed * parallel.size()))))


def score(
    model, tokens, window, bos_id, device, *, error=None, n_draws=2, n_steps=None, given=nothing_given, seed=0,
    max_tokens=None, batch_size=None, progress=False, seconds=None, interrupts=(),
):  # fmt: skip
    """Estimate the bound of a text from `n_draws` draws, or from as many as an `error` in nats per token takes -> Scores.

    model: any callable (theta, t, segment_ids) -> logits whose `config` has K, s1 and d_model. Each token is in one window
    of at most `window` tokens; with max_tokens, or if `seconds` are too few, only those of some rows are scored.
    batch_size (`rows_at_once` if None) changes nothing but rounding. Raises ValueError if no token is left to score.
    """
    text_of = partial(Text.planned, tokens, window, bos_id, given)
    n_rows = -(-max_tokens // window) if max_tokens else math.inf
    batch_size = batch_size or rows_at_once(window, model.config, device)
    if seconds:
        n_rows = rows_in_time(model, text_of(min(batch_size, n_rows)), n_rows, device, n_steps, seconds / 2)
    text = text_of(n_rows)
    n_rows, batch_size = text.plan.n_rows, math.ceil(min(batch_size, text.plan.n_rows) / parallel.size())
    batches = [range(i, min(i + batch_size, n_rows)) for i in range(0, n_rows, batch_size)]
    draws, stop, n_draws, start, seconds = [], False, 2 if error else n_draws, time.perf_counter(), seconds or math.inf
    with BoundBar(total=n_draws * len(parallel.share(batches)), disable=None if progress else True) as bar:
        bar.unknown = unknown_nats_per_token(tokens, bos_id)
        while len(draws) < n_draws and not stop:
            draw_seed = mix_seed(seed, "evaluate", len(draws))
            deadline = math.inf if draws else start + seconds / 2  # the speed can change
            draw, n_complete = score_once(model, text, batches, device, n_steps, draw_seed, bar, interrupts, deadline)
            if draws and n_complete < n_rows:
                break
            stop = parallel.total(len(interrupts))
            if not stop:  # later draws are of the same rows
                n_rows, batches = n_complete, [rows for rows in batches if rows.stop <= n_complete]
            draws.append(draw)
            scores = Scores.of(draws, text.first_rows(n_complete), n_steps)
            if error and len(draws) == n_draws:
                n_draws = draws_needed(scores, error)
            late = time.perf_counter() - start > seconds * len(draws) / (len(draws) + 1)  # no time for one more
            if parallel.total(int(late)):
                n_draws = max(2, len(draws))
            bar.total = n_draws * len(parallel.share(batches))
    scores.partial = len(draws) < n_draws or n_complete < n_rows
    return scores
