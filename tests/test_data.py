"""Packing, segments, masks and batches."""

import bisect
import threading

import numpy as np
import pytest
import torch

import data
import model as model_file
from common import parallel
from text import cache
from text.tokenizer import Tokenizer, train_tokenizer


def write(path, text):
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def corpus(tmp_path):
    """400 lines of 1 to 40 words, except one of 5000 words."""
    rng = np.random.default_rng(0)
    words = ["w" + "abcdefgh"[i % 8] * (1 + i % 4) for i in range(30)]
    lines = [" ".join(rng.choice(words, rng.integers(1, 41))) for _ in range(400)]
    lines[7] = " ".join(rng.choice(words, 5000))
    return write(tmp_path / "corpus.txt", "\n".join(lines) + "\n")


@pytest.fixture
def tokenizer(corpus):
    return Tokenizer(train_tokenizer(corpus, "bpe", 400))


@pytest.fixture
def tokens(corpus, tokenizer, tmp_path):
    return cache.load_corpus(corpus, tokenizer, tmp_path / "cache")


# ---------------------------------------------------------------- packing


def fake_tokens(lengths):
    """Make a corpus of documents of these lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return cache.Tokens(np.arange(offsets[-1]) % 60_000, offsets, 1, 1, 0, "fake", None)


def coverage(plan, n_tokens):
    """Count the windows that hold each token: (n_tokens,)."""
    counts = np.zeros(n_tokens + 1, dtype=int)
    np.add.at(counts, plan.starts, 1)
    np.add.at(counts, plan.starts + plan.lengths, -1)
    return counts.cumsum()[:-1]


@pytest.mark.parametrize(
    "lengths", [[5, 9, 3, 30, 64, 65, 200, 1, 2], [1000], [3], list(range(1, 150))]
)
def test_an_epoch_has_every_token_once_and_no_row_is_too_long(lengths):
    tokens = fake_tokens(lengths)
    plans = [data.plan_epoch(tokens, 64, 0, epoch) for epoch in range(4)] + [
        data.plan_validation(tokens, 64)
    ]
    for plan in plans:
        assert (coverage(plan, sum(lengths)) == 1).all()
        filled = np.add.reduceat(
            plan.lengths, plan.row_starts[:-1][plan.row_starts[:-1] < plan.row_starts[1:]]
        )
        assert filled.max() <= 64
        document = np.searchsorted(tokens.offsets, plan.starts, side="right") - 1
        assert (
            plan.starts + plan.lengths <= tokens.offsets[document + 1]
        ).all()  # no window crosses documents
    assert len({plan.n_rows for plan in plans[:4]}) == 1


def test_a_corpus_of_one_shard_is_packed_as_ever():
    """The sum is from before there were shards: runs of then must resume with the same batches."""
    lengths = np.random.default_rng(4).integers(1, 150, 3000)
    ids, segment_ids, _ = data.Loader(fake_tokens(lengths), 64, 500, seed=5).batch(20)
    weights = torch.arange(64) + 1
    assert fake_tokens(lengths).n_shards == 1
    assert (int((ids * weights).sum()), int((segment_ids * weights).sum())) == (
        30052305156,
        1478374,
    )


def test_the_validation_of_a_text_of_one_shard_is_planned_as_ever():
    """The sums are from before there were shards: bounds of then can be compared with new ones."""
    plan = data.plan_validation(fake_tokens(np.random.default_rng(4).integers(1, 150, 3000)), 64)
    sums = [
        int((x * (np.arange(len(x)) + first)).sum())
        for x, first in ((plan.starts, 1), (plan.lengths, 1), (plan.row_starts, 0))
    ]
    assert sums == [1518817138918, 584619409, 21662645630]


def test_no_more_shards_are_planned_for_validation_than_its_rows_take(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_DOCUMENTS", 100)
    tokens, read, real = (
        fake_tokens(np.random.default_rng(4).integers(1, 150, 950)),
        [],
        cache.Tokens.read_shard,
    )
    monkeypatch.setattr(
        cache.Tokens, "read_shard", lambda self, shard: read.append(shard) or real(self, shard)
    )
    whole = data.plan_validation(tokens, 64)
    assert read == list(range(10)) and (coverage(whole, len(tokens.ids)) == 1).all()
    read.clear()
    few = data.plan_validation(tokens, 64, 150)
    n = len(few.starts)
    assert (
        read == [0, 1]
        and few.n_rows >= 150
        and few.row_starts.tolist() == whole.row_starts[: few.n_rows + 1].tolist()
    )
    assert (few.starts.tolist(), few.lengths.tolist()) == (
        whole.starts[:n].tolist(),
        whole.lengths[:n].tolist(),
    )


@pytest.fixture
def shards(monkeypatch):
    """A corpus of 40 shards by its documents, and a loader of it."""
    monkeypatch.setattr(cache, "SHARD_DOCUMENTS", 100)
    lengths = np.random.default_rng(4).integers(1, 90, 4000)
    tokens = cache.Tokens(
        np.arange(lengths.sum()), np.append(0, lengths.cumsum()), 1, 1, 0, "fake", None
    )
    return tokens, data.Loader(tokens, 64, 7, seed=0)


def test_shards_have_every_document_once_from_all_over_the_corpus(shards):
    tokens, _ = shards
    documents = [tokens.shard_documents(shard) for shard in range(tokens.n_shards)]
    assert len(documents) == 40 and sorted(np.concatenate(documents).tolist()) == list(range(4000))
    assert all(len(index) == 100 and abs(index.mean() - 2000) < 60 for index in documents)


def test_an_epoch_of_many_shards_has_every_token_once_in_an_order_of_its_own(shards):
    tokens, loader = shards
    epochs = []
    for epoch in range(2):
        begin, end = epoch * loader.rows_per_epoch, (epoch + 1) * loader.rows_per_epoch
        batches = [loader.batch(n)[:2] for n in range(begin // 7, -(-end // 7))]
        ids, segment_ids = (
            torch.cat(x)[begin % 7 :][: loader.rows_per_epoch] for x in zip(*batches, strict=True)
        )
        seen = ids[segment_ids > 0]
        assert torch.equal(seen.sort().values, torch.from_numpy(tokens.ids))
        epochs.append(seen)
    assert not torch.equal(*epochs)
    assert loader.fill() == len(tokens.ids) / (64 * loader.rows_per_epoch) > 0.97
    other = data.Loader(tokens, 64, 7, seed=0)
    assert all(map(torch.equal, loader.batch(300), other.batch(300)))


@pytest.mark.parametrize(
    "lengths",
    [[5, 9, 3, 30, 64, 65, 200, 1, 2], [1000], [3], list(range(1, 150)), [64] * 9, [65] * 9],
)
def test_rows_are_counted_as_they_are_planned(lengths):
    for epoch in range(5):
        assert (
            data.count_rows(*fake_tokens(lengths).shard_counts(0), 64)
            == data.plan_epoch(fake_tokens(lengths), 64, 0, epoch).n_rows
        )


def test_a_corpus_of_long_documents_has_shards_too(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_TOKENS", 1000)
    assert fake_tokens([600] * 5).n_shards == 3 and fake_tokens([9000]).n_shards == 1
    assert data.Loader(fake_tokens([600] * 5), 64, 4, seed=0).rows_of_shard.tolist() == [20, 20, 11]


def test_lengths_are_counted_shard_by_shard(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_DOCUMENTS", 64)
    lengths = np.random.default_rng(0).integers(1, 99, 1000)
    assert (
        fake_tokens(lengths).count_lengths(40).tolist()
        == np.bincount(np.minimum(lengths, 40)).tolist()
    )


def test_a_document_that_fits_in_a_row_is_never_cut():
    lengths = np.random.default_rng(1).integers(1, 120, 500)
    plan = data.plan_epoch(fake_tokens(lengths), 64, 0, 0)
    whole = set(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    starts = np.cumsum(lengths) - lengths
    assert all((int(s), int(n)) in whole for s, n in zip(starts, lengths, strict=True) if n <= 64)


def test_a_long_document_is_cut_elsewhere_in_each_epoch():
    tokens = fake_tokens([10_000])
    offsets = {int(np.sort(data.plan_epoch(tokens, 64, 0, epoch).starts)[1]) for epoch in range(20)}
    assert len(offsets) > 10
    again = data.plan_epoch(tokens, 64, 0, 3)
    assert np.array_equal(again.starts, data.plan_epoch(tokens, 64, 0, 3).starts)


@pytest.mark.parametrize("row_length", [64, 128, 256])
def test_rows_are_more_than_99_percent_full_if_there_are_long_documents(row_length):
    lengths = (
        np.random.default_rng(2).geometric(1 / 100, 20_000) + 1
    )  # like paragraphs of 100 tokens
    assert data.plan_epoch(fake_tokens(lengths), row_length, 0, 0).fill(row_length) > 0.99


def best_fit(lengths, row_length):
    """Compute the fill that the textbook's best-fit decreasing reaches."""
    free = []
    for length in sorted(lengths, reverse=True):
        i = bisect.bisect_left(free, length)
        bisect.insort(free, (free.pop(i) if i < len(free) else row_length) - length)
    return sum(lengths) / (len(free) * row_length)


@pytest.mark.parametrize("row_length", [64, 128])
@pytest.mark.parametrize("spread", [(3, 20), (20, 45), (1, 64), (30, 34)])
def test_short_lines_fill_rows_as_well_as_best_fit_within_half_a_percent(row_length, spread):
    lengths = np.random.default_rng(3).integers(*spread, 3000)
    _, n_rows = data.pack(lengths, row_length, np.random.default_rng(0))
    assert lengths.sum() / (n_rows * row_length) > best_fit(lengths.tolist(), row_length) - 0.005


# ---------------------------------------------------------------- segments


@pytest.mark.parametrize(
    "segment_ids, since_start, until_end",
    [
        ([1, 1, 1, 2, 2, 2], [0, 1, 2, 0, 1, 2], [2, 1, 0, 2, 1, 0]),  # equal lengths
        ([1, 1, 2, 0, 0, 0], [0, 1, 0, 0, 1, 2], [1, 0, 0, 2, 1, 0]),  # padding
        ([1, 2, 3, 4, 4, 5], [0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]),  # single tokens
        ([0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]),  # an empty row
        ([7], [0], [0]),
    ],
)
def test_positions_are_counted_from_both_ends_of_each_segment(segment_ids, since_start, until_end):
    segment_ids = torch.tensor(
        [segment_ids, segment_ids]
    )  # the second row must not continue the first
    before, after = model_file.segment_positions(segment_ids)
    assert before.dtype == after.dtype == torch.int64
    assert before.tolist() == [since_start] * 2 and after.tolist() == [until_end] * 2
    starts = model_file.segment_starts(segment_ids)
    assert starts.dtype == torch.bool and starts.tolist() == [[n == 0 for n in since_start]] * 2


def test_segment_functions_do_not_wait_for_the_device():
    """A tensor on the meta device has no values: reading one back raises an error."""
    segment_ids = torch.ones(2, 5, dtype=torch.int64, device="meta")
    assert all(
        x.shape == (2, 5)
        for x in (
            model_file.segment_starts(segment_ids),
            *model_file.segment_positions(segment_ids),
        )
    )


# ---------------------------------------------------------------- batches


def test_batches_visit_each_token_once_per_epoch_and_continue_with_the_next_epoch(tokens):
    loader = data.Loader(tokens, 64, 8, seed=0)
    n_batches = -(-loader.rows_per_epoch // 8)
    ids, segment_ids = (
        torch.cat(x) for x in list(zip(*map(loader.batch, range(n_batches)), strict=True))[:2]
    )
    first_epoch = ids[: loader.rows_per_epoch][segment_ids[: loader.rows_per_epoch] > 0]
    assert torch.equal(
        first_epoch.sort().values, torch.from_numpy(np.sort(tokens.ids.astype(np.int64)))
    )
    assert (segment_ids[loader.rows_per_epoch :].sum(1) > 0).all()


@pytest.mark.parametrize("lengths", [[1000], [96], [70, 70, 70], [1], [3, 64, 65]])
def test_a_corpus_smaller_than_a_batch_is_visited_once_per_epoch(lengths):
    """Even if rows and whole batches are empty, as the last row of an epoch may be."""
    for B, n_epochs in ((4, 12), (1, 20)):
        loader = data.Loader(fake_tokens(lengths), 64, B, seed=0)
        n_batches = n_epochs // B * loader.rows_per_epoch
        tokens_seen = sum(int((loader.batch(n)[1] > 0).sum()) for n in range(n_batches))
        assert tokens_seen == n_epochs * sum(lengths)


def test_rows_hold_their_windows_numbered_in_order_and_padding_is_0(tokens):
    loader = data.Loader(tokens, 64, 16, seed=0)
    ids, segment_ids, _ = loader.batch(3)
    plan = loader.plan(0)
    for row, (got, segments) in enumerate(zip(ids, segment_ids, strict=True)):
        w = slice(*plan.row_starts[3 * 16 + row :][:2])
        expected = [
            tokens.ids[s : s + n].tolist()
            for s, n in zip(plan.starts[w], plan.lengths[w], strict=True)
        ]
        assert [got[segments == i + 1].tolist() for i in range(len(expected))] == expected
        assert (
            not got[segments == 0].any()
            and (segments.diff()[: sum(map(len, expected)) - 1] >= 0).all()
        )


def test_a_batch_depends_only_on_the_seed_and_its_number(tokens):
    one, other = (
        data.Loader(tokens, 64, 8, seed=0, bos_id=1),
        data.Loader(tokens, 64, 8, seed=0, bos_id=1),
    )
    other.batch(100)
    assert all(map(torch.equal, one.batch(5), other.batch(5)))
    assert not torch.equal(one.batch(5)[0], one.batch(6)[0])
    assert not torch.equal(
        one.batch(5)[0], data.Loader(tokens, 64, 8, seed=1, bos_id=1).batch(5)[0]
    )


def test_bos_is_always_given_and_padding_never(tokens):
    ids, segment_ids, seen = data.Loader(tokens, 64, 256, seed=0, bos_id=1).batch(0)
    assert (seen[ids == 1] == data.GIVEN).all() and (seen[segment_ids == 0] == data.SHARED).all()


def test_half_of_the_segments_have_nothing_given_a_quarter_a_span_and_a_quarter_scattered_tokens(
    monkeypatch,
):
    monkeypatch.setattr(data, "HIDDEN_SHARE", 0.0)
    segment_ids = np.repeat([[1, 2]], 20, axis=1).repeat(4000, axis=0)
    segment_ids[:, 20:] = 2
    mask = data.draw_seen(segment_ids, np.random.default_rng(0)).reshape(-1, 20) == data.GIVEN
    share = mask.mean(1)
    assert (share == 0).mean() == pytest.approx(0.5 + 0.5 / 20, abs=0.02)
    jumps = np.diff(mask.astype(int), axis=1)
    spans = ((jumps == 1).sum(1) + mask[:, 0] == 1) & (share > 0)
    assert 0.23 < spans.mean() < 0.33  # scattered positions look like a span now and then
    assert (
        np.bincount((share[share > 0] * 4).astype(int), minlength=4)[:4].min() / (share > 0).sum()
        > 0.2
    )
    assert mask.mean(0).min() > 0.1  # every position is given now and then


def test_at_first_most_of_every_text_is_given_and_then_no_more_than_usual(monkeypatch, tokens):
    """80 % of the open positions; it falls in a straight line to nothing half way."""
    monkeypatch.setattr(data, "HIDDEN_SHARE", 0.0)
    shares = [data.easy_share(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert shares == pytest.approx([0.8, 0.4, 0.0, 0.0])
    loader = data.Loader(tokens, 64, 256, seed=0)
    _, segment_ids, _ = loader.batch(0)
    first, middle, last = (loader.batch(0, x)[2] == data.GIVEN for x in (0.0, 0.25, 0.5))
    open_at_last = (segment_ids > 0) & ~last
    assert first[open_at_last].float().mean() == pytest.approx(0.8, abs=0.02)
    assert middle[open_at_last].float().mean() == pytest.approx(0.4, abs=0.02)
    assert first[last].all() and not first[segment_ids == 0].any()
    assert torch.equal(last, loader.batch(0)[2] == data.GIVEN)


def test_the_share_of_hidden_texts_rises_and_any_share_of_such_a_text_is_hidden():
    segment_ids = np.repeat(np.arange(1, 5), 20)[None].repeat(2000, axis=0)
    for progress in (0.0, 0.4, 1.0):
        seen = data.draw_seen(segment_ids, np.random.default_rng(0), progress).reshape(-1, 20)
        hidden = seen == data.HIDDEN
        chosen = hidden.any(1)
        assert chosen.mean() == pytest.approx(data.HIDDEN_SHARE * progress * 20 / 21, abs=0.01)
        assert set(np.unique(seen[chosen])) <= {data.GIVEN, data.HIDDEN}
        own = (seen == data.OWN).any(1)
        n_given = (seen == data.GIVEN).sum(1)
        assert own[~chosen & (n_given < 20)].mean() == pytest.approx(data.OWN_SHARE, abs=0.02)
        assert not (own & chosen).any()
        if progress:
            counts = np.bincount(hidden[chosen].sum(1), minlength=21)[1:] / chosen.sum()
            assert counts == pytest.approx(np.full(20, 1 / 20), abs=0.02)
            assert hidden[chosen].mean(0) == pytest.approx(np.full(20, 0.525), abs=0.03)


def test_prefetch_keeps_the_order_passes_errors_on_and_stops_its_threads():
    started, n_threads = [], threading.active_count()
    results = parallel.prefetch(lambda n: started.append(n) or n * n, range(20), depth=3)
    assert next(results) == 0 and len(started) <= 5
    assert list(results) == [n * n for n in range(1, 20)]
    with pytest.raises(ZeroDivisionError):
        list(parallel.prefetch(lambda n: 1 // n, [1, 0]))
    assert threading.active_count() == n_threads
