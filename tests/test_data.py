"""Reading, tokenising, caching, packing and masking."""

import bisect
import io
import os
import threading

import numpy as np
import pytest
import sentencepiece
import torch

import data

UNICODE = [
    "plain words",
    "  two  spaces  at both ends  ",
    "naïve café, Ελληνικά, 日本語のテキスト, العربية",
    "🙂👩‍👩‍👧 emoji\tand tabs",
    "a\u2028b line and paragraph separators \u2029 stay inside a line",
    "digits 1234567890 and <s> </s> <unk>",
]


def write(path, text):
    path.write_bytes(text.encode())
    return path


def read(path, **more):
    """Put the pieces of a file together again -> list of lines."""
    lines = []
    for piece in data.read_pieces(path, **more):
        if piece.first:
            lines.append("")
        lines[-1] += piece.text
    return lines


@pytest.fixture
def corpus(tmp_path):
    """400 lines of 1 to 40 words, one of them very long."""
    rng = np.random.default_rng(0)
    words = ["w" + "abcdefgh"[i % 8] * (1 + i % 4) for i in range(30)]
    lines = [" ".join(rng.choice(words, rng.integers(1, 41))) for _ in range(400)]
    lines[7] = " ".join(rng.choice(words, 5000))
    return write(tmp_path / "corpus.txt", "\n".join(lines) + "\n")


@pytest.fixture
def tokenizer_path(corpus, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data.train_tokenizer(corpus, "bpe", 400))
    return path


@pytest.fixture
def tokens(corpus, tokenizer_path, tmp_path):
    return data.load_corpus(corpus, tokenizer_path, tmp_path / "cache")


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("max_bytes", [9, 64, 1 << 16])
@pytest.mark.parametrize("ending", ["", "\n"])
def test_pieces_put_together_are_the_lines(tmp_path, max_bytes, ending):
    path = write(tmp_path / "text", "\n".join(UNICODE) + ending)
    assert read(path, max_bytes=max_bytes) == UNICODE
    assert sum(p.n_bytes for p in data.read_pieces(path, max_bytes=max_bytes)) == sum(len(x.encode()) for x in UNICODE)


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_not_text(tmp_path):
    assert read(write(tmp_path / "text", "\ufeffone\r\n\r\n   \ntwo\n\n\n")) == ["one", "two"]
    assert read(write(tmp_path / "empty", "")) == []


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "latin").write_bytes(b"fine\n" * 3 + "café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin is not UTF-8: byte 18 is 0xe9.*iconv"):
        read(tmp_path / "latin")


@pytest.mark.parametrize("text", ["a line\n" * 500, "word " * 50_000, "é" * 5000, "one two\n" * 20])
def test_the_parts_of_a_corpus_share_nothing_and_leave_nothing_out(tmp_path, text):
    """Many lines, one giant line with and without spaces, few lines."""
    path = write(tmp_path / "text", text)
    n_chars = {part: sum(len(p.text) for p in data.read_part(path, part)) for part in ("all", "train", "val")}
    assert n_chars["train"] + n_chars["val"] == n_chars["all"]
    assert 0.01 < n_chars["val"] / n_chars["all"] < 0.08


def test_held_out_lines_are_in_step_with_no_pattern(tmp_path):
    path = write(tmp_path / "text", "".join(f"{i}\n" for i in range(20_000)))
    held_out = np.array([int(p.text) for p in data.read_part(path, "val")])
    assert len(held_out) == pytest.approx(400, abs=3)
    for period in (2, 3, 10, 50):
        assert np.bincount(held_out % period, minlength=period).min() > 0


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_bpe_and_unigram_give_every_line_back(tmp_path, kind):
    path = write(tmp_path / "text", "\n".join(UNICODE * 20))
    (tmp_path / "model").write_bytes(data.train_tokenizer(path, kind, 600))
    tokenizer = data.load_tokenizer(tmp_path / "model")
    for line in [*UNICODE, "ΩЖ漢 never seen before 🦩"]:
        assert tokenizer.decode(tokenizer.encode(line)) == line


def test_the_character_model_has_the_characters_and_unk_alone(tmp_path):
    path = write(tmp_path / "text", "the quick brown fox jumps over a lazy dog " * 30)
    (tmp_path / "model").write_bytes(data.train_tokenizer(path, "char", 0))
    tokenizer = data.load_tokenizer(tmp_path / "model")
    assert len(tokenizer) == 28 and tokenizer.bos_id() == tokenizer.eos_id() == -1
    assert tokenizer.decode(tokenizer.encode(" a  lazy fox ")) == " a  lazy fox "


def test_a_tokenizer_that_cannot_be_is_refused_in_words(tmp_path):
    path = write(tmp_path / "text", "".join(map(chr, range(0x4E00, 0x5000))))
    with pytest.raises(ValueError, match="no bpe tokenizer with --vocab_size=20"):
        data.train_tokenizer(path, "bpe", 20)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        data.load_tokenizer(path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        data.load_tokenizer(tmp_path / "missing")


# ---------------------------------------------------------------- the cache


def test_a_document_is_bos_tokens_eos_and_decodes_to_its_line(tokens, corpus, tokenizer_path):
    tokenizer = data.load_tokenizer(tokenizer_path)
    lines = corpus.read_text().splitlines()
    assert len(tokens.lengths) == len(lines) and tokens.n_chars == tokens.n_bytes == sum(map(len, lines))
    for line, begin, end in zip(lines, tokens.offsets, tokens.offsets[1:], strict=False):
        bos, *ids, eos = tokens.ids[begin:end].tolist()
        assert (bos, eos) == (tokenizer.bos_id(), tokenizer.eos_id())
        assert tokenizer.decode(ids) == line and not {bos, eos} & set(ids)


@pytest.mark.parametrize("add_prefix", [False, True])
def test_a_giant_line_in_pieces_is_nearly_what_it_is_whole(tmp_path, corpus, add_prefix, monkeypatch):
    """Also where the tokenizer puts a space before each text, as most do."""
    text = write(tmp_path / "giant", corpus.read_text().replace("\n", " "))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.read_text().split("\n")), model_writer=model, vocab_size=100, hard_vocab_limit=False,
        add_dummy_prefix=add_prefix, remove_extra_whitespaces=add_prefix, max_sentence_length=100_000, minloglevel=2, bos_id=-1, eos_id=-1, pad_id=0, unk_id=1,
    )  # fmt: skip
    (tmp_path / "model").write_bytes(model.getvalue())
    tokenizer = data.load_tokenizer(tmp_path / "model")
    monkeypatch.setattr(data, "PIECE_BYTES", 5000)
    monkeypatch.setattr(data.read_pieces, "__defaults__", (0, None, 5000))
    tokens = data.load_corpus(text, tmp_path / "model", tmp_path / "cache")
    assert len(tokens.lengths) == 1
    whole = tokenizer.encode(text.read_text())
    if add_prefix:  # words are never cut, so nothing differs
        assert tokens.ids.tolist() == whole
    assert tokenizer.decode(tokens.ids.tolist()).split() == text.read_text().split()


def test_the_cache_is_used_again_and_rebuilt_when_corpus_or_tokenizer_change(
    tokens, corpus, tokenizer_path, tmp_path, monkeypatch
):
    written = []
    real = data._write_cache
    monkeypatch.setattr(data, "_write_cache", lambda *args: (written.append(args), real(*args)))
    assert data.load_corpus(corpus, tokenizer_path, tmp_path / "cache").key == tokens.key and not written
    corpus.write_text(corpus.read_text() + "one more\n")
    longer = data.load_corpus(corpus, tokenizer_path, tmp_path / "cache")
    assert len(longer.lengths) == len(tokens.lengths) + 1 and len(written) == 1
    tokenizer_path.write_bytes(data.train_tokenizer(corpus, "unigram", 400))
    assert data.load_corpus(corpus, tokenizer_path, tmp_path / "cache").key != longer.key and len(written) == 2


@pytest.mark.parametrize("name, size", [("ids.bin", 100), ("ids.bin", 0), ("offsets.bin", 16), ("meta.json", 5)])
def test_a_damaged_cache_is_rebuilt(corpus, tokenizer_path, tmp_path, name, size):
    whole = data.load_corpus(corpus, tokenizer_path, tmp_path / "cache")
    os.truncate(tmp_path / "cache" / whole.key / name, size)
    again = data.load_corpus(corpus, tokenizer_path, tmp_path / "cache")
    assert again.ids.tolist() and again.offsets[-1] == len(again.ids)
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / whole.key]


def test_tokenising_that_breaks_off_leaves_no_cache(corpus, tokenizer_path, tmp_path):
    corpus.write_bytes(corpus.read_bytes() + b"\xff\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="not UTF-8"):
            data.load_corpus(corpus, tokenizer_path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_line_that_turns_into_no_tokens_is_no_document(tmp_path, monkeypatch):
    corpus = write(tmp_path / "text", "abc\nx\nabc\n")
    (tmp_path / "model").write_bytes(data.train_tokenizer(corpus, "char", 0))
    tokenizer = data.load_tokenizer(tmp_path / "model")
    real = type(tokenizer).encode_as_numpy
    monkeypatch.setattr(
        type(tokenizer), "encode_as_numpy", lambda self, texts: [r[r != self.piece_to_id("x")] for r in real(self, texts)]
    )
    assert data.load_corpus(corpus, tmp_path / "model", tmp_path / "cache").lengths.tolist() == [3, 3]


def test_missing_and_empty_corpora_are_refused(tokenizer_path, tmp_path):
    with pytest.raises(ValueError, match="no text file at"):
        data.load_corpus(tmp_path / "missing", tokenizer_path, tmp_path)
    with pytest.raises(ValueError, match="has no text"):
        data.load_corpus(write(tmp_path / "blank", "\n \n\n"), tokenizer_path, tmp_path)


# ---------------------------------------------------------------- packing


def fake_tokens(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return data.Tokens(np.arange(offsets[-1]) % 60_000, offsets, 1, 1, 0, "fake")


def coverage(plan, n_tokens):
    counts = np.zeros(n_tokens + 1, dtype=int)
    np.add.at(counts, plan.starts, 1)
    np.add.at(counts, plan.starts + plan.lengths, -1)
    return counts.cumsum()[:-1]


@pytest.mark.parametrize("lengths", [[5, 9, 3, 30, 64, 65, 200, 1, 2], [1000], [3], list(range(1, 150))])
def test_an_epoch_covers_every_token_once_in_rows_that_do_not_overflow(lengths):
    tokens = fake_tokens(lengths)
    plans = [data.plan_epoch(tokens, 64, 0, epoch) for epoch in range(4)] + [data.plan_validation(tokens, 64)]
    for plan in plans:
        assert (coverage(plan, sum(lengths)) == 1).all()
        filled = np.add.reduceat(plan.lengths, plan.row_starts[:-1][plan.row_starts[:-1] < plan.row_starts[1:]])
        assert filled.max() <= 64
        document = np.searchsorted(tokens.offsets, plan.starts, side="right") - 1
        assert (plan.starts + plan.lengths <= tokens.offsets[document + 1]).all()  # no window crosses documents
    assert len({plan.n_rows for plan in plans[:4]}) == 1


def test_short_documents_stay_whole():
    lengths = np.random.default_rng(1).integers(1, 120, 500)
    plan = data.plan_epoch(fake_tokens(lengths), 64, 0, 0)
    whole = set(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    starts = np.cumsum(lengths) - lengths
    assert all((int(s), int(n)) in whole for s, n in zip(starts, lengths, strict=True) if n <= 64)


def test_windows_of_a_long_document_move_from_epoch_to_epoch():
    tokens = fake_tokens([10_000])
    offsets = {int(np.sort(data.plan_epoch(tokens, 64, 0, epoch).starts)[1]) for epoch in range(20)}
    assert len(offsets) > 10
    again = data.plan_epoch(tokens, 64, 0, 3)
    assert np.array_equal(again.starts, data.plan_epoch(tokens, 64, 0, 3).starts)


@pytest.mark.parametrize("row_length", [64, 128, 256])
def test_long_documents_fill_more_than_99_percent(row_length):
    lengths = np.random.default_rng(2).geometric(1 / 100, 20_000) + 1  # like paragraphs of 100 tokens
    assert data.plan_epoch(fake_tokens(lengths), row_length, 0, 0).fill(row_length) > 0.99


def best_fit(lengths, row_length):
    """Fill reached by the textbook's best-fit decreasing."""
    free = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(free, length)
        bisect.insort(free, (free.pop(at) if at < len(free) else row_length) - length)
    return sum(lengths) / (len(free) * row_length)


@pytest.mark.parametrize("row_length", [64, 128])
@pytest.mark.parametrize("spread", [(3, 20), (20, 45), (1, 64), (30, 34)])
def test_short_lines_are_packed_within_half_a_point_of_best_fit(row_length, spread):
    lengths = np.random.default_rng(3).integers(*spread, 3000)
    _, n_rows = data.pack(lengths, row_length, np.random.default_rng(0))
    assert lengths.sum() / (n_rows * row_length) > best_fit(lengths.tolist(), row_length) - 0.005


# ---------------------------------------------------------------- batches


def test_an_epoch_of_batches_visits_each_token_once_and_runs_on_into_the_next(tokens):
    loader = data.Loader(tokens, 64, 8, seed=0)
    n_batches = -(-loader.rows_per_epoch // 8)
    ids, segment_ids = (torch.cat(x) for x in list(zip(*map(loader.batch, range(n_batches)), strict=True))[:2])
    first_epoch = ids[: loader.rows_per_epoch][segment_ids[: loader.rows_per_epoch] > 0]
    assert torch.equal(first_epoch.sort().values, torch.from_numpy(np.sort(tokens.ids.astype(np.int64))))
    assert (segment_ids[loader.rows_per_epoch :].sum(1) > 0).all()


@pytest.mark.parametrize("lengths", [[1000], [96], [70, 70, 70], [1], [3, 64, 65]])
def test_every_batch_of_a_small_corpus_can_be_made(lengths):
    """Rows, and whole batches, that hold nothing included: an epoch's last row may be empty."""
    for B, n_epochs in ((4, 12), (1, 20)):
        loader = data.Loader(fake_tokens(lengths), 64, B, seed=0)
        n_batches = n_epochs // B * loader.rows_per_epoch
        tokens_seen = sum(int((loader.batch(n)[1] > 0).sum()) for n in range(n_batches))
        assert tokens_seen == n_epochs * sum(lengths)


def test_segments_are_numbered_in_order_and_padding_is_zero(tokens):
    loader = data.Loader(tokens, 64, 16, seed=0)
    ids, segment_ids, _ = loader.batch(3)
    plan = loader.plan(0)
    for row, (got, segments) in enumerate(zip(ids, segment_ids, strict=True)):
        w = slice(*plan.row_starts[3 * 16 + row :][:2])
        expected = [tokens.ids[s : s + n].tolist() for s, n in zip(plan.starts[w], plan.lengths[w], strict=True)]
        assert [got[segments == i + 1].tolist() for i in range(len(expected))] == expected
        assert not got[segments == 0].any() and (segments.diff()[: sum(map(len, expected)) - 1] >= 0).all()


def test_a_batch_is_a_pure_function_of_seed_and_number(tokens):
    one, other = data.Loader(tokens, 64, 8, seed=0, bos_id=1), data.Loader(tokens, 64, 8, seed=0, bos_id=1)
    other.batch(100)
    assert all(map(torch.equal, one.batch(5), other.batch(5)))
    assert not torch.equal(one.batch(5)[0], one.batch(6)[0])
    assert not torch.equal(one.batch(5)[0], data.Loader(tokens, 64, 8, seed=1, bos_id=1).batch(5)[0])


def test_bos_is_always_given_and_padding_never(tokens):
    ids, segment_ids, cond_mask = data.Loader(tokens, 64, 256, seed=0, bos_id=1).batch(0)
    assert cond_mask[ids == 1].all() and not cond_mask[segment_ids == 0].any()


def test_half_of_the_segments_are_free_a_quarter_has_a_span_and_a_quarter_scattered_positions():
    segment_ids = np.repeat([[1, 2]], 20, axis=1).repeat(4000, axis=0)
    segment_ids[:, 20:] = 2
    mask = data.draw_cond_mask(segment_ids, np.random.default_rng(0)).reshape(-1, 20)
    share = mask.mean(1)
    assert (share == 0).mean() == pytest.approx(0.5 + 0.5 / 20, abs=0.02)
    jumps = np.diff(mask.astype(int), axis=1)
    spans = ((jumps == 1).sum(1) + mask[:, 0] == 1) & (share > 0)
    assert 0.23 < spans.mean() < 0.33  # scattered positions look like a span now and then
    assert np.bincount((share[share > 0] * 4).astype(int), minlength=4)[:4].min() / (share > 0).sum() > 0.2
    assert mask.mean(0).min() > 0.1  # every position is given now and then


def test_work_ahead_comes_in_order_and_errors_come_through():
    started, n_threads = [], threading.active_count()
    results = data.ahead(lambda n: started.append(n) or n * n, range(20), depth=3)
    assert next(results) == 0 and len(started) <= 5
    assert list(results) == [n * n for n in range(1, 20)]
    with pytest.raises(ZeroDivisionError):
        list(data.ahead(lambda n: 1 // n, [1, 0]))
    assert threading.active_count() == n_threads  # they are gone when the results are


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_tokenizer_for_a_text_that_turns_out_not_to_be_utf8_says_so_and_nothing_else(tmp_path, kind):
    (tmp_path / "latin").write_bytes(b"the king sleeps\n" * 500 + b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"^\S+latin is not UTF-8: byte 8003 is 0xe9\. Convert it[^:]*$"):
        data.train_tokenizer(tmp_path / "latin", kind, 300)
