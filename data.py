"""From tokens to batches: pack the examples of a corpus into rows, and choose what is given.

    window       at most L consecutive tokens of one document, which is an example of the corpus
    ids          (B, L) int64  rows of a batch, each packed with windows, 0 = padding
    segment_ids  (B, L) int64  number of the window in its row: 1, 2, ..., 0 = padding
    seen         (B, L) int8   what the network sees of a token: see `draw_seen`

Whatever is random depends only on (seed, epoch), or on (seed, number of the batch, progress of the
training), so a loader has no state to save. Training begins with easy texts, in which most tokens
are given.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from model import segment_positions

EASY_SHARE = 0.8  # of tokens, see `easy_share`
HIDDEN_SHARE, OWN_SHARE = 0.5, 0.5  # of texts, see `draw_seen`
SHARED, GIVEN, HIDDEN, OWN = range(4)  # what the network sees of a token


# ---------------------------------------------------------------- packing


@dataclass(frozen=True)
class Plan:
    """Which windows each row holds: row r holds windows row_starts[r] to row_starts[r + 1] - 1."""

    starts: np.ndarray  # (n_windows,) int64, index in Tokens.ids of the first token
    lengths: np.ndarray  # (n_windows,) int64, tokens
    row_starts: np.ndarray  # (n_rows + 1,) int64

    @property
    def n_rows(self):
        return len(self.row_starts) - 1

    def fill(self, row_length):
        """Compute the share of positions that hold a token."""
        return self.lengths.sum() / (self.n_rows * row_length)

    def first_rows(self, n_rows):
        """Cut the plan to its first rows, or to all if it has fewer."""
        row_starts = self.row_starts[: min(n_rows, self.n_rows) + 1]
        n_windows = row_starts[-1]
        return Plan(self.starts[:n_windows], self.lengths[:n_windows], row_starts)


def pack(lengths, row_length, rng):
    """Place windows of at most `row_length` tokens in rows -> row of each window (n,), row count.

    Fill a row, long windows first; repeat it with windows of the same lengths while there are
    enough; then fill the next. So the work depends on the number of different lengths, not of
    windows. `rng` chooses among windows of equal length.
    """
    order = rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]  # by length, then random
    n_left = np.bincount(lengths, minlength=row_length + 1)  # windows of each length without a row:
    ends = np.cumsum(n_left)  # they are order[ends[length] - n_left[length] : ends[length]]
    row_of = np.empty(len(lengths), dtype=np.int64)
    n_rows = 0
    for contents, repeats in _fill_rows(n_left, row_length):
        for length, n in contents:
            placed = order[ends[length] - n * repeats : ends[length]]
            row_of[placed] = n_rows + np.arange(n * repeats) // n
            ends[length] -= n * repeats
        n_rows += repeats
    return row_of, int(n_rows)


def _fill_rows(n_left, row_length):
    """Use up the windows of each length, long ones first, row by row.

    -> contents of a row, as a list of (length, number of windows), and its repeats
    """
    while n_left.any():
        contents, free = [], row_length
        lengths = np.flatnonzero(n_left)
        while len(lengths := lengths[: np.searchsorted(lengths, free, side="right")]):
            length, lengths = lengths[-1], lengths[:-1]
            contents.append((length, n := min(free // length, n_left[length])))
            free -= n * length
        repeats = min(n_left[length] // n for length, n in contents)
        for length, n in contents:
            n_left[length] -= n * repeats
        yield contents, repeats


def _make_plan(starts, lengths, row_of, n_rows, rng):
    """Put the rows in random order and sort the windows by row -> Plan."""
    row_of = rng.permutation(n_rows)[row_of]
    order = np.argsort(row_of, kind="stable")
    row_starts = np.searchsorted(row_of[order], np.arange(n_rows + 1))
    return Plan(starts[order], lengths[order], row_starts)


def count_rows(lengths, n, row_length):
    """Count the rows of `plan_epoch`, in any epoch, for n[i] documents of lengths[i] tokens."""
    short = lengths <= row_length
    n_left = np.zeros(row_length + 1, np.int64)
    n_left[lengths[short]] = n[short]
    n_packed = int(sum(repeats for _, repeats in _fill_rows(n_left, row_length)))
    n_free = n_packed * row_length - int(lengths[short] @ n[short])
    n_long = int(lengths[~short] @ n[~short])
    return n_packed + _count_more_rows(n_long, n_free, row_length)


def _count_more_rows(n_tokens, n_free, row_length):
    """Count the rows that the tokens of long documents need in addition to n_free positions."""
    n_needed = n_tokens + row_length - 1 if n_tokens else 0  # for the largest skip
    return max(0, -(-(n_needed - n_free) // row_length))


def plan_epoch(tokens, row_length, seed, epoch, shard=0):
    """Pack short documents whole, and cut long ones to fill the rest: each token once -> Plan.

    The windows of long documents differ from epoch to epoch: the order of these documents is
    random, and so is the number of positions, less than `row_length`, that stay empty before the
    first. The number of rows is always the same.
    """
    rng = np.random.default_rng((seed, epoch, 0, shard))  # for shard 0, the same as (seed, epoch)
    offsets, lengths = tokens.read_shard(shard)
    short = np.flatnonzero(lengths <= row_length)
    row_of_short, n_packed = pack(lengths[short], row_length, rng)
    filled = np.bincount(row_of_short, weights=lengths[short], minlength=n_packed)
    free = row_length - filled.astype(np.int64)

    long = rng.permutation(np.flatnonzero(lengths > row_length))
    n_more = _count_more_rows(int(lengths[long].sum()), int(free.sum()), row_length)
    free = np.append(free, np.full(n_more, row_length))
    skip = rng.integers(row_length)
    document, starts, window_lengths, row_of_window = _pour(lengths[long], free, skip)
    return _make_plan(
        np.append(offsets[short], offsets[long][document] + starts),
        np.append(lengths[short], window_lengths),
        np.append(row_of_short, row_of_window),
        len(free),
        rng,
    )


def _pour(lengths, free, skip):
    """Cut documents to fill the free positions of rows.

    -> document, start in it, length and row of each window. The documents come one after another,
    and the first `skip` free positions stay empty. A window ends where its row or document ends.
    """
    # Only free positions are numbered. Documents a and b have 7 tokens, skip is 1, # is packed:
    #
    #     row 0   # # # - a a     free  0 ..  2     cuts at  1 (skip), 3 (end of row 0)
    #     row 1   # # # # # #     none
    #     row 2   # # a a a a           3 ..  6              7 (end of row 2)
    #     row 3   a b b b b b           7 .. 12              8 (end of a), 13 (end of row 3)
    #     row 4   b b . . . .          13 .. 18             15 (end of b)
    #
    # A batch's rows are filled from the left: there, the skipped position (-) ends row 0.
    row_ends = np.cumsum(free)
    document_ends = skip + np.cumsum(lengths)
    cuts = np.unique(np.concatenate([[skip], row_ends, document_ends]))
    cuts = cuts[(cuts >= skip) & (cuts <= skip + lengths.sum())]
    begins, ends = cuts[:-1], cuts[1:]
    document = np.searchsorted(document_ends, begins, side="right")
    starts = begins - (document_ends - lengths)[document]
    return document, starts, ends - begins, np.searchsorted(row_ends, begins, side="right")


def plan_validation(tokens, row_length, n_rows=math.inf):
    """Cut each document at multiples of `row_length`, always the same: each token once -> Plan.

    n_rows: as many are enough, so the Plan covers only the first shards, which come from all over
    the text.
    """
    plans = []
    while not plans or (len(plans) < tokens.n_shards and sum(p.n_rows for p in plans) < n_rows):
        begins, sizes = tokens.read_shard(len(plans))
        n_windows = -(-sizes // row_length)  # of each document
        position = row_length * count_up(n_windows)
        lengths = np.minimum(row_length, np.repeat(sizes, n_windows) - position)
        starts = np.repeat(begins, n_windows) + position
        rng = np.random.default_rng((0, len(plans)))
        plans.append(_make_plan(starts, lengths, *pack(lengths, row_length, rng), rng))
    starts = np.concatenate([plan.starts for plan in plans])
    lengths = np.concatenate([plan.lengths for plan in plans])
    n_windows = np.concatenate([np.diff(plan.row_starts) for plan in plans])  # in each row
    return Plan(starts, lengths, np.append(0, n_windows.cumsum()))


def count_up(sizes):
    """Number the members of each group from 0: group sizes [3, 1, 2] -> [0, 1, 2, 0, 0, 1]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def gather_rows(tokens, plan, rows, row_length):
    """Read the rows of a plan whose numbers are `rows` (B,) -> ids, segment_ids, int64 (B, L)."""
    # A row is filled from the left without holes. So the tokens of all windows, joined, are what
    # the filled positions of all rows hold in reading order:
    #
    #     row 0   windows a a a, b b       ids   a a a b b .     segment_ids   1 1 1 2 2 0
    #     row 1   window  c c c c                c c c c . .                   1 1 1 1 0 0
    first = plan.row_starts[rows]
    n_windows = plan.row_starts[rows + 1] - first  # in each row
    number = count_up(n_windows)  # of each window in its row
    window = np.repeat(first, n_windows) + number  # index in the plan
    starts, lengths = plan.starts[window], plan.lengths[window]
    row = np.repeat(np.arange(len(rows)), n_windows)  # of each window
    n_tokens = np.bincount(row, weights=lengths, minlength=len(rows))  # in each row
    filled = np.arange(row_length) < n_tokens[:, None]  # (B, L)
    ids, segment_ids = np.zeros((2, len(rows), row_length), dtype=np.int64)
    ids[filled] = tokens.ids[np.repeat(starts, lengths) + count_up(lengths)]
    segment_ids[filled] = np.repeat(number + 1, lengths)
    return ids, segment_ids


def easy_share(progress):
    """Share of the other tokens that is given too, so that training begins with easy texts.

    It falls in a straight line, from EASY_SHARE at progress 0, the start, to 0 at 0.5, half way.
    """
    return EASY_SHARE * max(0.0, 1 - 2 * progress)


def draw_seen(segment_ids, rng, progress=1.0):
    """Choose what the network sees of each token: segment_ids (B, L) -> (B, L) int8, both numpy.

        SHARED    evidence of one time for all positions of a segment, as in the bound
        GIVEN     the token itself
        HIDDEN    nothing
        OWN       evidence of a time drawn only for this token

    In a share of the segments that rises from 0 to HIDDEN_SHARE, random positions are GIVEN and all
    others HIDDEN. Of the other segments, a share OWN_SHARE is OWN, and the rest SHARED. In half of
    these, nothing is GIVEN, else a random span or random positions; of the rest, `easy_share` is
    GIVEN too. The share of a segment that is GIVEN is uniform on (0, 1).
    """
    B, L = segment_ids.shape
    position, until_end = (x.numpy() for x in segment_positions(torch.from_numpy(segment_ids)))
    size = position + until_end + 1
    of_segment = np.arange(B)[:, None], segment_ids  # picks from a (B, L + 1) array of segments
    kind, share, u, v, w = (draw[of_segment] for draw in rng.random((5, B, L + 1)))
    n = (share * size).astype(np.int64)
    begin = (u * (size - n + 1)).astype(np.int64)
    span = (begin <= position) & (position < begin + n)
    scattered = rng.random((B, L)) < share
    given = np.where(kind < 0.5, False, np.where(kind < 0.75, span, scattered))
    given |= rng.random((B, L)) < easy_share(progress)
    is_hidden = v < HIDDEN_SHARE * progress
    given = np.where(is_hidden, scattered, given)
    others = np.where(is_hidden, HIDDEN, np.where(w < OWN_SHARE, OWN, SHARED))
    return np.where(segment_ids > 0, np.where(given, GIVEN, others), SHARED).astype(np.int8)


class Loader:
    """Training batches of packed rows. `batch(n, progress)` depends only on (seed, n, progress).

    The rows of epochs 0, 1, 2, ... form one sequence, and batch n is rows n B to (n + 1) B - 1 of
    it. An epoch reads the shards of the corpus one after another, in random order, so that memory
    does not grow with the corpus.
    """

    def __init__(self, tokens, row_length, batch_size, seed, bos_id=-1, label_ids=()):
        self.tokens, self.row_length, self.batch_size = tokens, row_length, batch_size
        self.seed, self.bos_id, self.label_ids = seed, bos_id, list(label_ids)
        counts = map(tokens.shard_counts, range(tokens.n_shards))
        self.rows_of_shard = np.array([count_rows(*pair, row_length) for pair in counts])
        self.rows_per_epoch = int(self.rows_of_shard.sum())
        plan = partial(plan_epoch, tokens, row_length, seed)
        self.plan = lru_cache(maxsize=2)(plan)  # plan(epoch, shard)

    def fill(self):
        """Compute the share of positions that hold a token."""
        return len(self.tokens.ids) / (self.rows_per_epoch * self.row_length)

    def count_steps(self, epochs, accumulation=1):
        """Count the steps of `accumulation` batches that some epochs take."""
        return math.ceil(epochs * self.rows_per_epoch / self.batch_size / accumulation)

    def batch(self, n, progress=1.0):
        """Make batch n -> ids, segment_ids, seen, each a tensor (B, L).

        bos is always given, a label in half of the texts or more. progress: the share of the
        training that is done, in [0, 1].
        """
        rows = n * self.batch_size + np.arange(self.batch_size)
        epochs = rows // self.rows_per_epoch
        parts = []
        for epoch in np.unique(epochs):
            parts += self.read(int(epoch), rows[epochs == epoch])
        ids, segment_ids = map(np.concatenate, zip(*parts, strict=True))
        rng = np.random.default_rng((self.seed, 0, n))
        seen = draw_seen(segment_ids, rng, progress)
        if self.label_ids:
            is_label = np.isin(ids, self.label_ids) & (segment_ids > 0)
            seen[is_label & (rng.random(ids.shape) < 0.5)] = GIVEN
        seen[(ids == self.bos_id) & (segment_ids > 0)] = GIVEN
        return tuple(map(torch.from_numpy, (ids, segment_ids, seen)))

    def read(self, epoch, rows):
        """Read rows (n,), numbered through all epochs, of an epoch; yield ids, segment_ids."""
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.rows_of_shard))
        begins = np.append(0, self.rows_of_shard[order].cumsum())
        row = rows - epoch * self.rows_per_epoch
        index = np.searchsorted(begins, row, side="right") - 1  # in `order`
        for i in np.unique(index):
            plan = self.plan(epoch, int(order[i]))
            rows_of_shard = row[index == i] - begins[i]
            yield gather_rows(self.tokens, plan, rows_of_shard, self.row_length)


def pad(templates, device):
    """Put templates of different lengths into one batch -> padded (B, L), segment_ids (B, L)."""
    rows = [torch.tensor(template) for template in templates]
    ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return tuple(pad_sequence(x, batch_first=True).to(device) for x in (rows, ones))
