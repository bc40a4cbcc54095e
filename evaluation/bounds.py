"""A bound on -log P of a text, from random times and noise, with its errors.

The text is cut into N windows, which are packed into rows. One draw gives a time to every window
and noise to every position; the bound is the mean of R draws:

    index     (B, L)  int64    window of each position, counted through the text
    t         (R, N)  float64  time of each window
    loss      (R, N)  float64  integrand of L_inf (or of L_n), nats, summed over scored tokens
    n_scored  (N,)    float64  scored tokens of each window: all but bos and what is given
"""

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from tqdm import tqdm

import bfn
import data
from common import parallel
from common.noise import GOLDEN, Draws, mix_seed
from common.precision import network_of
from model import rows_at_once, segment_positions
from text import cache

MAX_DRAWS = 64
TIME_BINS = 50
UNKNOWN_BITS = 9  # per byte that the tokenizer does not know: 8, and 1 for whether another follows


# ---------------------------------------------------------------- what is scored


def nothing_given(segment_ids):
    """Give nothing: segment_ids (B, L) -> (B, L) bool, all False."""
    return torch.zeros_like(segment_ids, dtype=torch.bool)


def prefix(share, segment_ids):
    """Give the first share of each window: segment_ids (B, L) -> (B, L) bool."""
    before, after = segment_positions(segment_ids)
    return before < (share * (before + after + 1).double()).round()


def around(share, segment_ids):
    """Give all of each window but a gap of this share in its middle, of at least a token."""
    before, after = segment_positions(segment_ids)
    size = (before + after + 1).double()
    gap = (share * size).round().clamp(min=1)
    start = (size - gap) // 2
    return (before < start) | (before >= start + gap)


GIVEN_PARTS = {"prefix": prefix, "around": around}  # by the flag --given


@dataclass(frozen=True)
class Text:
    """A text as windows in rows, and what of it is scored."""

    tokens: cache.Tokens
    row_length: int  # also the longest window
    given: object = nothing_given  # function: segment_ids (B, L) -> what is given, (B, L) bool
    n_rows: float = math.inf  # at most so many, whose windows come from all over the text

    @cached_property
    def plan(self):
        """The windows and their rows. Only as much of the text is planned as `n_rows` takes."""
        plan = data.plan_validation(self.tokens, self.row_length, self.n_rows)
        return plan.first_rows(self.n_rows)

    def first_rows(self, n_rows):
        """Cut a text to its first rows. A plan that was made stays."""
        text = replace(self, n_rows=min(n_rows, self.n_rows))
        if "plan" in vars(self):
            vars(text)["plan"] = self.plan.first_rows(n_rows)
        return text

    def first_tokens(self, n_tokens):
        """Cut a text to the rows that have about so many tokens."""
        return self.first_rows(-(-n_tokens // self.row_length))

    def batches(self, size):
        """List ranges of `size` rows."""
        n_rows = self.plan.n_rows
        return [range(i, min(i + size, n_rows)) for i in range(0, n_rows, size)]

    @property
    def document(self):
        """Document of each window, counted through the text: (N,)."""
        return np.searchsorted(self.tokens.offsets, self.plan.starts, side="right") - 1

    def windows(self):
        """List the ids of each window -> N arrays."""
        spans = zip(self.plan.starts, self.plan.lengths, strict=True)
        return [self.tokens.ids[start : start + n] for start, n in spans]

    def read(self, rows):
        """Read a range of rows -> ids, segment_ids, cond_mask, index of the window, each (B, L).

            segment_ids  1 1 1 2 2 0      row_starts[row] = 7: the row holds windows 7 and 8
            index        7 7 7 8 8 7

        Padding gets the index of the row's first window; it is never scored.
        """
        rows_read = data.gather_rows(self.tokens, self.plan, np.asarray(rows), self.row_length)
        ids, segment_ids = map(torch.as_tensor, rows_read)
        is_bos = ids == self.tokens.tokenizer.bos
        cond_mask = (is_bos | self.given(segment_ids)) & (segment_ids > 0)
        first = torch.as_tensor(self.plan.row_starts[rows.start : rows.stop])
        return ids, segment_ids, cond_mask, first[:, None] + (segment_ids - 1).clamp(min=0)


def n_scorable(tokens):
    """Count the tokens of a whole text that are scored if nothing is given: all but bos."""
    return max(1, int(tokens.offsets[-1]) - (tokens.tokenizer.bos >= 0) * tokens.n_documents)


def unknown_nats_per_token(tokens):
    """Compute the cost of bytes that the tokenizer does not know, averaged over the whole text."""
    return UNKNOWN_BITS * math.log(2) * tokens.n_unknown_bytes / n_scorable(tokens)


# ---------------------------------------------------------------- how it is scored


@dataclass(frozen=True)
class Work:
    """How scoring is done. This may end it early, but changes no figure."""

    device: torch.device
    batch_size: int | None = None  # rows of a call, `rows_at_once` if None
    seconds: float = math.inf
    interrupts: list | tuple = ()  # no longer empty once it should stop
    progress: bool = False  # show a bar


def add_up_batches(batches, add, totals, work, deadline, n_ahead=0):
    """Let each process read its share of the batches -> how many, from the first on, were read.

    add(batch) adds to `totals`, tensors on the CPU, which are then added up over all processes. It
    stops after a batch if work.interrupts is no longer empty, or if n_ahead batches more would take
    until after the `deadline` of time.perf_counter().
    """
    is_read = torch.zeros(len(batches), dtype=torch.float64)
    for i in parallel.share(range(len(batches))):
        begin = time.perf_counter()
        add(batches[i])
        is_read[i] = 1
        end = time.perf_counter()
        if work.interrupts or end + n_ahead * (end - begin) > deadline:
            break
    parallel.add_up([*totals, is_read], patient=True)
    return int(is_read.cumprod(0).sum())  # processes stop at different batches


# ---------------------------------------------------------------- draws


def draw_times(n_windows, seed, n_steps=None):
    """Draw a time for each window w: t = frac(u + w * golden ratio), one u a text -> (N,) float32.

    Each t is uniform and together they are spread evenly. For L_n, t is where one of the n_steps
    steps starts.
    """
    u = seed / 2**63  # seeds from `mix_seed` are uniform in [0, 2^63)
    t = (u + torch.arange(n_windows, dtype=torch.float64) * GOLDEN).frac().float()
    return (t * n_steps).long().clamp(max=n_steps - 1) / n_steps if n_steps else t


@torch.no_grad()
def losses_at(model, ids, segment_ids, cond_mask, t, noise, n_steps=None):
    """Compute the integrand of L_inf (or L_n), the cross-entropy, a draw of L_rec: each (B, L)."""
    K, s1 = model.config.K, model.config.s1
    network = network_of(model, segment_ids)
    log_p = bfn.predict_noisy(network, ids, t, cond_mask, s1, K, noise.normal(K))
    if n_steps:
        i = (t * n_steps).round().long() + 1  # t = (i - 1) / n_steps
        loss = bfn.n_step_error(log_p, ids, i, n_steps, s1, noise.normal(K))
    else:
        loss = bfn.squared_error_loss(log_p, ids, t, s1)
    cross_entropy = bfn.cross_entropy(log_p, ids)
    eps = noise.normal(K)
    return loss, cross_entropy, bfn.reconstruction_loss(network, ids, cond_mask, s1, K, eps)


class BoundBar(tqdm):
    """A progress bar that shows the bound so far, nats per token."""

    nats = n_scored = unknown = 0.0  # unknown: what unknown text adds, nats per token

    def add(self, nats, n_scored):
        """Count one more batch."""
        self.nats += nats
        self.n_scored += n_scored
        bound = self.nats / max(1, self.n_scored) + self.unknown
        self.set_postfix_str(f"bound {bound:.3f} nats/token", refresh=False)
        self.update()  # shows it when it is time to


def score_once(model, text, work, n_steps, seed, bar, deadline=math.inf):
    """Make one draw, in batches of work.batch_size rows -> five sums, number of complete rows.

    The sums are time, loss, cross-entropy, reconstruction loss and number of scored tokens, each
    (N,) float64, all but the time over the scored tokens of each window. A row's noise follows from
    the seed and the row's number, so the batch size does not change it.
    """
    t = draw_times(len(text.plan.starts), seed, n_steps)
    sums = torch.zeros(4, len(t), dtype=torch.float64)

    def add(rows):
        ids, segment_ids, cond_mask, index = text.read(rows)
        seeds = [mix_seed(seed, row) for row in rows]
        noise = Draws.seeded(seeds, [text.row_length] * len(rows), work.device)
        inputs = (x.to(work.device) for x in (ids, segment_ids, cond_mask, t[index]))
        losses = [loss.cpu().double() for loss in losses_at(model, *inputs, noise, n_steps)]
        scored = (segment_ids > 0) & ~cond_mask
        values = torch.stack([*losses, torch.ones_like(losses[0])])[:, scored]
        sums.index_add_(1, index[scored], values)
        bar.add(values[0].sum().item() + values[2].sum().item(), values.shape[1])

    batches = text.batches(work.batch_size)
    n_rows = batches[add_up_batches(batches, add, [sums], work, deadline) - 1].stop
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
    n_steps: int | None  # None for the continuous-time loss
    text: Text  # only the rows that were scored
    partial: bool = False  # stopped by Ctrl-C

    @classmethod
    def of(cls, draws, text, n_steps):
        """Stack the draws of `score_once`. Raises ValueError if they scored no token."""
        *t_and_losses, n_scored = map(np.stack, zip(*draws, strict=True))
        if n_scored[0].sum() == 0:
            raise ValueError("nothing of this text is left to score: give less of it")
        return cls(*t_and_losses, n_scored[0], n_steps, text)

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
        """Average over bins of time -> bin (R, N), loss and cross-entropy, each (n_bins,).

        Both in nats per token, nan in a bin without draws. L_n has at most one bin per step.
        """
        n_bins = min(n_bins, self.n_steps or n_bins)
        index = (self.t * n_bins + 1e-4).astype(int)  # the steps of L_n start at the bins' edges
        index = np.minimum(index, n_bins - 1)

        def total(x):
            return np.bincount(index.ravel(), np.broadcast_to(x, index.shape).ravel(), n_bins)

        with np.errstate(invalid="ignore"):
            n_scored = total(self.n_scored)
            return index, total(self.loss) / n_scored, total(self.cross_entropy) / n_scored

    def residuals(self):
        """Subtract the mean loss by time -> residuals (R, N), correction of their variance.

        Times are spread evenly, so what only follows from t adds no error. The correction
        n / (n - n_bins) is for fitting the curve to the same n draws.
        """
        n_draws = self.loss.size
        index, curve, _ = self.by_time(int(np.clip(n_draws // 20, 1, TIME_BINS)))
        residuals = self.loss - self.n_scored * np.nan_to_num(curve)[index]
        return residuals, n_draws / max(1, n_draws - len(curve))

    def monte_carlo_variance(self):
        """Variance of the whole text's bound over noise and times, nats^2; nan for one draw."""
        if len(self.loss) < 2:
            return math.nan
        residuals, correction = self.residuals()
        variance = correction * residuals.var(0, ddof=1) + self.reconstruction.var(0, ddof=1)
        return variance.sum() / len(self.loss)

    def monte_carlo_error(self):
        """Standard error of the bound from noise and times, nats per token."""
        return math.sqrt(self.monte_carlo_variance()) / self.n_scored.sum()

    def text_error(self):
        """Standard error of the bound from the choice of text -> nats per token, n_clusters.

        The clusters are documents, or the windows if there is only one. The Monte-Carlo variance is
        subtracted. nan if nothing is left of the variance, or for a single cluster.
        """
        residuals, _ = self.residuals()
        reconstruction = self.nats_per_token[1]
        excess = residuals.mean(0) + self.reconstruction.mean(0) - self.n_scored * reconstruction
        noise_variance = np.nan_to_num(self.monte_carlo_variance())
        return clustered_error(excess, self.n_scored, self.text.document, noise_variance)


def clustered_error(excess, n_scored, document, noise_variance=0.0):
    """Standard error per token, clustered by document -> error, n_clusters, see `text_error`.

    excess (what windows cost more than the mean), n_scored, document: (N,). The noise_variance of
    their sum is not the text's.
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
    """Estimate how many draws reach a Monte-Carlo error: it falls with the root of their number."""
    n_draws = len(scores.loss)
    ratio = min(scores.monte_carlo_error() / error, MAX_DRAWS)
    needed = max(n_draws + 1, n_draws * ratio**2) if ratio > 1 else n_draws
    return math.ceil(min(MAX_DRAWS, needed))


def seconds_per_row(model, text, device, n_steps, most):
    """Read a batch of at most so many rows twice -> time of the second reading, seconds per row."""
    text = text.first_rows(min(most, rows_at_once(text.row_length, model.config, device)))
    work = Work(device, text.plan.n_rows)
    for _ in range(2):  # the first time as a warm-up
        start = time.perf_counter()
        score_once(model, text, work, n_steps, 0, BoundBar(disable=True))
    return (time.perf_counter() - start) / text.plan.n_rows


def rows_in_time(model, text, work, n_steps, batch_size):
    """Choose how many rows all processes score twice in work.seconds, by the speed of a batch."""
    speed = seconds_per_row(model, text, work.device, n_steps, batch_size)
    n_rows = max(1, work.seconds / 2 // speed * parallel.size())
    return parallel.from_first(int(min(text.n_rows, n_rows)))


def score(model, text, work, *, n_draws=2, error=None, n_steps=None, seed=0):
    """Estimate the bound of a Text from `n_draws` draws, or as many as an `error` takes -> Scores.

    model: any callable (theta, t, segment_ids) -> logits whose `config` has K, s1 and d_model.
    error: nats per token. If work.seconds are too few, only some rows are scored. Raises ValueError
    if no token is left to score.
    """
    batch_size = work.batch_size or rows_at_once(text.row_length, model.config, work.device)
    if work.seconds < math.inf:
        text = text.first_rows(rows_in_time(model, text, work, n_steps, batch_size))
    work = replace(work, batch_size=math.ceil(min(batch_size, text.plan.n_rows) / parallel.size()))
    n_draws = 2 if error else n_draws
    draws, stop, start = [], False, time.perf_counter()
    n_batches = len(parallel.share(text.batches(work.batch_size)))
    look = dict(desc="evaluating", unit="batch", disable=None if work.progress else True)
    with BoundBar(total=n_draws * n_batches, **look) as bar:
        bar.unknown = unknown_nats_per_token(text.tokens)
        while len(draws) < n_draws and not stop:
            draw_seed = mix_seed(seed, "evaluate", len(draws))
            deadline = math.inf if draws else start + work.seconds / 2  # the speed can change
            draw, n_complete = score_once(model, text, work, n_steps, draw_seed, bar, deadline)
            if draws and n_complete < text.plan.n_rows:
                break
            draws.append(draw)
            complete = text.first_rows(n_complete)
            scores = Scores.of(draws, complete, n_steps)
            stop = parallel.total(len(work.interrupts)) > 0
            if not stop:
                text = complete  # later draws are of the same rows
            if error and len(draws) == n_draws:
                n_draws = draws_needed(scores, error)
            latest = work.seconds * len(draws) / (len(draws) + 1)  # when there is time for one more
            if parallel.total(int(time.perf_counter() - start > latest)):
                n_draws = max(2, len(draws))
            bar.total = n_draws * len(parallel.share(text.batches(work.batch_size)))
    scores.partial = len(draws) < n_draws or n_complete < text.plan.n_rows
    return scores
