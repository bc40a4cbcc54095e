"""The cache of tokenised corpora: what it holds, when it is used, and what interrupts it."""

import errno
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

import data
from text import cache
from text.reading import Corpus, read_part, read_pieces
from text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


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


def test_documents_are_the_examples(tmp_path):
    """And the same file read otherwise is another corpus, with another cache."""
    path = write(tmp_path / "text", "one\ntwo\n\nthree\n\n\n")
    tokenizer, keys = Tokenizer(train_tokenizer(path, "bpe", 300, "paragraph")), set()
    expected = dict(
        line=["one", "two", "three"], paragraph=["one\ntwo", "three"], file=["one\ntwo\n\nthree"]
    )
    for example, texts in expected.items():
        tokens = cache.load_corpus(path, tokenizer, tmp_path / "cache", example=example)
        documents = np.split(tokens.ids, tokens.offsets[1:-1])
        assert [tokenizer.decode(ids[1:-1].tolist()) for ids in documents] == texts
        assert tokens.n_chars == sum(map(len, texts))
        keys.add(tokens.key)
    assert len(keys) == 3


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_documents_have_equal_hashes_only_if_they_are_equal(tokens, monkeypatch, chunk):
    documents = [ids.tobytes() for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
    hashes = cache.hash_documents(tokens, np.arange(tokens.n_documents), chunk)
    assert (
        len(set(documents))
        == len(set(hashes.tolist()))
        == len(set(zip(documents, hashes.tolist(), strict=True)))
    )


def test_a_reordered_or_repeated_document_has_another_hash():
    ids = np.array([1, 2, 3, 3, 2, 1, 1, 2, 2, 1, 1, 2, 3], np.uint16)
    tokens = cache.Tokens(ids, np.array([0, 3, 6, 8, 10, 13]), 0, 0, 0, "", None)
    hashes = cache.hash_documents(tokens, np.arange(5)).tolist()
    assert cache.hash_documents(tokens, np.array([2, 0])).tolist() == [hashes[2], hashes[0]]
    assert hashes[0] == hashes[4] and len(set(hashes)) == 4


def test_the_share_of_documents_that_the_training_text_has_too(tmp_path, corpus, tokenizer):
    """Half of these lines are in the corpus; one of them is there twice."""
    lines = corpus.read_text().splitlines()
    val = write(tmp_path / "val", "\n".join([lines[3], lines[3], lines[8] + " wa", "wb wb wb"]))
    training, val = (
        cache.load_corpus(path, tokenizer, tmp_path / "cache") for path in (corpus, val)
    )
    assert (
        cache.share_in_training(val, training) == 0.5
        and cache.share_in_training(training, training) == 1
    )


def test_of_large_texts_the_share_in_training_is_estimated_from_a_sample(monkeypatch):
    """Of 20,000 documents, 3 of 10 are in the training text, elsewhere; some are there twice."""
    monkeypatch.setattr(cache, "SHARD_DOCUMENTS", 3000)
    rng = np.random.default_rng(0)
    training = rng.integers(0, 60_000, (40_000, 4))
    val = np.concatenate([rng.permutation(training)[:6000], rng.integers(0, 60_000, (14_000, 4))])
    training[20_000:30_000] = training[:10_000]
    val[:6000] = training[rng.permutation(20_000)[:6000]]

    def share():
        tokens = (
            cache.Tokens(ids.ravel(), np.arange(len(ids) + 1) * 4, 1, 1, 0, "", None)
            for ids in (val, training)
        )
        return cache.share_in_training(*tokens)

    assert share() == 0.3
    monkeypatch.setattr(cache, "N_HASHES", 3000)
    assert share() == pytest.approx(0.3, abs=0.05)


def test_a_document_is_bos_tokens_eos_and_decodes_to_its_line(tokens, corpus, tokenizer):
    lines = corpus.read_text().splitlines()
    assert tokens.n_documents == len(lines) and tokens.n_chars == tokens.n_bytes == sum(
        map(len, lines)
    )
    for line, begin, end in zip(lines, tokens.offsets, tokens.offsets[1:], strict=False):
        bos, *ids, eos = tokens.ids[begin:end].tolist()
        assert (bos, eos) == (tokenizer.bos, tokenizer.eos)
        assert tokenizer.decode(ids) == line and not {bos, eos} & set(ids)


@pytest.mark.parametrize("add_prefix", [False, True])
def test_a_very_long_line_tokenised_in_pieces_is_the_same_text(
    tmp_path, corpus, add_prefix, monkeypatch
):
    """Also with a tokenizer that puts a space before each text, as most do."""
    text = write(tmp_path / "giant", corpus.read_text().replace("\n", " "))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.read_text().split("\n")), model_writer=model,
        vocab_size=100, hard_vocab_limit=False, add_dummy_prefix=add_prefix, minloglevel=2,
        remove_extra_whitespaces=False, max_sentence_length=100_000,
        bos_id=-1, eos_id=-1, pad_id=0, unk_id=1,
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue())
    monkeypatch.setattr("text.reading.PIECE_BYTES", 5000)
    assert len(list(read_pieces(text))) > 4
    tokens = cache.load_corpus(text, tokenizer, tmp_path / "cache")
    assert tokens.n_documents == 1
    whole = tokenizer.encode(text.read_text())
    if add_prefix:  # no token is longer than a word, and words are not cut
        assert tokens.ids.tolist() == whole
    assert tokenizer.decode(tokens.ids.tolist()).split() == text.read_text().split()


def test_the_cache_is_reused_until_the_corpus_or_the_tokenizer_changes(
    tokens, corpus, tokenizer, tmp_path, monkeypatch
):
    written = []
    real = cache._write_cache
    monkeypatch.setattr(cache, "_write_cache", lambda *args: (written.append(args), real(*args)))
    assert (
        cache.load_corpus(corpus, tokenizer, tmp_path / "cache").key == tokens.key and not written
    )
    corpus.write_text(corpus.read_text() + "one more\n")
    longer = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    assert longer.n_documents == tokens.n_documents + 1 and len(written) == 1
    tokenizer = Tokenizer(train_tokenizer(corpus, "unigram", 400))
    assert (
        cache.load_corpus(corpus, tokenizer, tmp_path / "cache").key != longer.key
        and len(written) == 2
    )


def test_a_cache_of_which_a_number_in_the_description_changed_is_rebuilt(
    corpus, tokenizer, tmp_path
):
    tokens = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    path = tmp_path / "cache" / tokens.key / "meta.json"
    path.write_text(
        path.read_text().replace(
            f'"n_bytes": {tokens.n_bytes}', f'"n_bytes": {tokens.n_bytes + 100}'
        )
    )
    assert cache.load_corpus(corpus, tokenizer, tmp_path / "cache").n_bytes == tokens.n_bytes


@pytest.mark.parametrize(
    "name, size", [("ids.bin", 100), ("ids.bin", 0), ("offsets.bin", 16), ("meta.json", 5)]
)
def test_a_damaged_cache_is_rebuilt(corpus, tokenizer, tmp_path, name, size):
    tokens = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    ids, offsets = (
        tokens.ids.tolist(),
        tokens.offsets.tolist(),
    )  # copies: the arrays are views of the files
    os.truncate(tmp_path / "cache" / tokens.key / name, size)
    rebuilt = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    assert rebuilt.ids.tolist() == ids and rebuilt.offsets.tolist() == offsets
    assert without_locks(tmp_path / "cache") == [tmp_path / "cache" / tokens.key]


@pytest.mark.parametrize("name", ["ids.bin", "offsets.bin"])
def test_a_cache_of_which_one_byte_changed_is_rebuilt(corpus, tokenizer, tmp_path, name):
    tokens = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    ids, offsets = tokens.ids.tolist(), tokens.offsets.tolist()
    path = tmp_path / "cache" / tokens.key / name
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    rebuilt = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    assert rebuilt.ids.tolist() == ids and rebuilt.offsets.tolist() == offsets


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 bytes, of which 4 are checked."""
    monkeypatch.setattr(cache, "BLOCK_BYTES", 64)
    monkeypatch.setattr(cache, "N_BLOCKS", 4)


@pytest.mark.parametrize("damage", ["first", "last", "shifted", "cut", "zeros"])
def test_damage_of_a_large_file_is_found_in_a_few_blocks(tmp_path, small_blocks, damage):
    """Zeros in 60 % of the blocks are found at a start with probability 0.84: in 40 for sure."""
    path, content = tmp_path / "ids.bin", bytearray(np.random.default_rng(0).bytes(6400 + 17))
    path.write_bytes(content)
    sums = cache.checksums(path, cache.BLOCK_BYTES)
    assert len(sums) == 101 and all(cache.check(path, sums) for _ in range(20))
    if damage in ("first", "last"):
        content[0 if damage == "first" else -1] ^= 1
    elif damage == "shifted":
        content = content[:300] + b"x" + content[300:-1]
    elif damage == "cut":
        del content[6400:]
    else:
        content[1280:5120] = bytes(3840)
    path.write_bytes(content)
    assert not all(cache.check(path, sums) for _ in range(40 if damage == "zeros" else 1))


def test_only_some_blocks_of_a_large_file_are_read(tmp_path, small_blocks, monkeypatch):
    path, crc32, read = tmp_path / "ids.bin", cache.zlib.crc32, []
    path.write_bytes(bytes(10_000))
    sums = cache.checksums(path, cache.BLOCK_BYTES)
    monkeypatch.setattr(
        cache.zlib, "crc32", lambda block, value: read.append(block) or crc32(block, value)
    )
    assert cache.check(path, sums) and len(read) == 4 and sum(map(len, read)) <= 256


def test_a_large_corpus_is_read_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "LARGE_BYTES", 10)
    files, read, real = [tmp_path / "a.txt", tmp_path / "b.txt"], [], cache.file_hash
    monkeypatch.setattr(
        cache,
        "file_hash",
        lambda path, *rest: read.append(os.path.basename(path)) or real(path, *rest),
    )

    def set_file(path, text, age):
        write(path, text)
        os.utime(path, (time.time() - age,) * 2)
        read.clear()

    def identity(path=tmp_path):
        return cache.content_hash(cache.Corpus.of(path), tmp_path / "cache")

    for path in files:
        set_file(path, "some text", 100)
    first = identity()
    assert identity() == first and read == ["a.txt", "b.txt"]
    set_file(files[1], "some test", 50)
    second = identity()
    assert second != first and identity() == second and read == ["b.txt"]
    set_file(files[1], "some text", 0)  # it may still change without a new time
    assert identity() == first and identity() == first and read == ["b.txt", "b.txt"]
    (tmp_path / "cache" / "hashes.json").write_text("[5")
    assert identity() == first


def test_the_identity_of_a_text_is_its_content(tmp_path):
    """That of one plain file is as it was when a text was always one file."""

    def identity(path, field="text"):
        return cache.content_hash(cache.Corpus(str(path), field), tmp_path)

    a, b = write(tmp_path / "a.txt", "one\n"), write(tmp_path / "b.txt", "two\n")
    objects = write(tmp_path / "c.jsonl", '{"text": "one", "body": "two"}')
    assert identity(a) == hashlib.sha256(b"one\n").hexdigest()
    both = identity(f"{a},{b}")
    assert (
        len(
            {
                identity(a),
                identity(b),
                both,
                identity(f"{b},{a}"),
                identity(objects),
                identity(objects, "body"),
            }
        )
        == 6
    )
    b.rename(tmp_path / "d.txt")
    assert identity(f"{a},{tmp_path / 'd.txt'}") == both


def test_what_a_killed_run_has_begun_is_removed_when_nobody_went_on_with_it(
    corpus, tokenizer, tmp_path
):
    (tmp_path / "cache").mkdir()
    old = 2 * cache.STALE_SECONDS
    for name, age in (("0" * 32, old), ("1" * 32, 0), ("mine", old)):
        folder, lock = tmp_path / "cache" / f"{name}.tmp", tmp_path / "cache" / f"{name}.lock"
        folder.mkdir()
        lock.touch()
        (folder / "ids.bin").write_bytes(b"begun")
        for path in (folder / "ids.bin", folder, lock):
            os.utime(path, (time.time() - age,) * 2)
    key = cache.load_corpus(corpus, tokenizer, tmp_path / "cache").key
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        key,
        f"{key}.lock",
        "1" * 32 + ".tmp",
        "1" * 32 + ".lock",
        "mine.tmp",
        "mine.lock",
    }


def without_locks(folder):
    """List what is in a cache folder besides the files of locks -> paths."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def files_of(folder):
    """Read all files of a folder -> {name: content}."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_parts(monkeypatch):
    """done.json is written about every 30 lines."""
    monkeypatch.setattr(cache, "BATCH", 10)
    monkeypatch.setattr(cache, "PART_BYTES", 2000)


def interrupt(monkeypatch, inputs, stop, after):
    """Tokenise, and call `stop` in batch number `after`; kill -9 needs a separate process."""
    calls, real = [], cache._count

    def count(*args):
        calls.append(args)
        if len(calls) == after:
            stop()
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_count", count)
        if stop is kill:
            process = multiprocessing.get_context("fork").Process(
                target=cache.load_corpus, args=inputs
            )
            process.start()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        else:
            with pytest.raises((KeyboardInterrupt, OSError)):
                cache.load_corpus(*inputs)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def press_ctrl_c():
    raise KeyboardInterrupt


def fill_disk():
    raise OSError(errno.ENOSPC, "no space left")


@pytest.mark.parametrize("stop", [kill, press_ctrl_c, fill_disk])
@pytest.mark.parametrize("part", ["all", "train"])
def test_tokenising_goes_on_after_an_interruption_and_ends_with_the_same_bytes(
    corpus, tokenizer, tmp_path, monkeypatch, small_parts, capsys, stop, part
):
    inputs = corpus, tokenizer, tmp_path / "cache", part
    whole = cache.load_corpus(corpus, tokenizer, tmp_path / "whole", part)
    for after in (15, 10):
        interrupt(monkeypatch, inputs, stop, after)
    monkeypatch.setattr(
        cache,
        "_encode",
        lambda pieces, tokenizer, real=cache._encode: (
            encoded.append(pieces) or real(pieces, tokenizer)
        ),
    )
    encoded = []
    capsys.readouterr()
    tokens = cache.load_corpus(*inputs)
    assert 10 < len(encoded) < 25 and encoded[0][0].number > 150
    assert "tokenising goes on after" in capsys.readouterr().err
    assert files_of(tmp_path / "cache" / tokens.key) == files_of(tmp_path / "whole" / whole.key)
    assert without_locks(tmp_path / "cache") == [tmp_path / "cache" / tokens.key]


@pytest.mark.parametrize("name", ["ids.bin", "offsets.bin", "done.json"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_tokenising_begins_anew_after_an_incomplete_or_damaged_part(
    corpus, tokenizer, tmp_path, monkeypatch, small_parts, name, damage
):
    inputs = corpus, tokenizer, tmp_path / "cache"
    whole = cache.load_corpus(corpus, tokenizer, tmp_path / "whole")
    interrupt(monkeypatch, inputs, press_ctrl_c, 20)
    path = tmp_path / "cache" / f"{whole.key}.tmp" / name
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content if damage == "flip" else content[:30])
    assert files_of(tmp_path / "cache" / cache.load_corpus(*inputs).key) == files_of(
        tmp_path / "whole" / whole.key
    )


def test_parts_of_another_text_are_not_used(corpus, tokenizer, tmp_path, monkeypatch, small_parts):
    inputs = corpus, tokenizer, tmp_path / "cache"
    interrupt(monkeypatch, inputs, press_ctrl_c, 20)
    corpus.write_text(corpus.read_text()[::-1].strip())
    whole = cache.load_corpus(corpus, tokenizer, tmp_path / "whole")
    assert files_of(tmp_path / "cache" / cache.load_corpus(*inputs).key) == files_of(
        tmp_path / "whole" / whole.key
    )


def test_processes_that_need_the_same_text_tokenise_it_once(
    corpus, tokenizer, tmp_path, monkeypatch, capsys
):
    """Locks hold between threads as between processes, because each opens the file."""
    written, real = [], cache._write_cache
    monkeypatch.setattr(
        cache, "_write_cache", lambda *args: (written.append(args), time.sleep(0.3), real(*args))
    )
    with ThreadPoolExecutor(3) as pool:
        caches = list(
            pool.map(lambda _: cache.load_corpus(corpus, tokenizer, tmp_path / "cache"), range(3))
        )
    assert len(written) == 1 and len({tokens.ids.tobytes() for tokens in caches}) == 1
    assert "another process tokenises the same text" in capsys.readouterr().err
    assert without_locks(tmp_path / "cache") == [tmp_path / "cache" / caches[0].key]


def test_without_locks_processes_tokenise_the_same_text_side_by_side(
    corpus, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache.cli, "hold", lambda file, wait=False: False)
    together, real = threading.Barrier(3), cache._tokenize
    monkeypatch.setattr(cache, "_tokenize", lambda *args: (together.wait(9), real(*args))[1])
    with ThreadPoolExecutor(3) as pool:
        inputs = corpus, tokenizer, tmp_path / "cache"
        caches = list(pool.map(lambda _: cache.load_corpus(*inputs), range(3)))
    assert len({tokens.ids.tobytes() for tokens in caches}) == 1
    assert without_locks(tmp_path / "cache") == [tmp_path / "cache" / caches[0].key]


def test_a_cache_folder_that_cannot_be_written_is_answered_with_the_flag_for_another(
    corpus, tokenizer, tmp_path
):
    for folder in (corpus / "cache", "/proc/cache"):  # below a file; nobody can write there
        with pytest.raises(ValueError, match="cannot be written .* give --cache_dir=FOLDER"):
            cache.load_corpus(corpus, tokenizer, folder)


def test_a_temporary_cache_folder_is_named(corpus, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache.cli, "user_cache_dir", lambda: (str(tmp_path), False))
    cache.load_corpus(corpus, tokenizer, cache.cli.default_cache_dir())
    error = capsys.readouterr().err
    assert f"go to {cache.cli.default_cache_dir()}; --cache_dir=FOLDER names another" in error
    cache.load_corpus(corpus, tokenizer, tmp_path / "mine")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "example, part",
    [("line", "all"), ("line", "train"), ("line", "val"), ("paragraph", "all"), ("file", "train")],
)
@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl"])
def test_reading_can_go_on_at_the_end_of_every_example(tmp_path, monkeypatch, example, part, kind):
    """Also of few examples, which are split by bytes, and of examples in several pieces."""
    monkeypatch.setattr("text.reading.PIECE_BYTES", 30)
    text = "\ufeffone two\r\n\n\nthree ä four\n" + "five six " * 9 + "\n \nseven\n"
    for i in range(40 if part != "all" else 2):
        raw = (json.dumps(dict(text=text)) if kind == "jsonl" else text).encode()
        (tmp_path / f"{i:02}.{kind}").write_bytes(gzip.compress(raw) if kind == "txt.gz" else raw)
    pieces = list(read_part(tmp_path, part, example))
    assert len(pieces) > 2
    for i, piece in enumerate(pieces):
        if piece.last and i % max(1, len(pieces) // 20) == 0:
            assert (
                list(read_part(tmp_path, part, example, piece.end, piece.number + 1))
                == pieces[i + 1 :]
            )


def test_the_start_of_a_cached_corpus_does_not_look_at_its_documents(
    corpus, tokenizer, tmp_path, monkeypatch
):
    """So that it takes no longer for a corpus of more documents."""
    monkeypatch.setattr(cache, "SHARD_DOCUMENTS", 64)
    tokens = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    rows, lengths = data.Loader(tokens, 64, 8, seed=0).rows_of_shard, np.diff(tokens.offsets)
    for name in ("read_shard", "shard_documents"):
        monkeypatch.setattr(cache.Tokens, name, None)
    opened = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    assert (
        data.Loader(opened, 64, 8, seed=0).rows_of_shard.tolist() == rows.tolist()
        and len(rows) == 7
    )
    assert opened.count_lengths(40).tolist() == np.bincount(np.minimum(lengths, 40)).tolist()
    assert cache.share_in_training(opened, opened) == 1


def test_a_cache_without_counts_is_made_again(corpus, tokenizer, tmp_path):
    """As they were written before."""
    whole = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    files, folder = files_of(tmp_path / "cache" / whole.key), tmp_path / "cache" / whole.key
    for name in ("shard_lengths.bin", "hash_counts.bin"):
        (folder / name).unlink()
    assert (
        cache.load_corpus(corpus, tokenizer, tmp_path / "cache").key == whole.key
        and files_of(folder) == files
    )


@pytest.mark.parametrize(
    "meta",
    [
        "[]",
        "5",
        pytest.param("[" * 100_000, id="nested"),
        '{"dtype": "no"}',
        '{"dtype": 5}',
        "{}",
        "null",
    ],
)
def test_a_cache_with_a_garbled_description_is_rebuilt(corpus, tokenizer, tmp_path, meta):
    tokens = cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    ids = tokens.ids.tolist()
    (tmp_path / "cache" / tokens.key / "meta.json").write_text(meta)
    assert cache.load_corpus(corpus, tokenizer, tmp_path / "cache").ids.tolist() == ids


def test_tokenising_that_fails_leaves_no_cache(corpus, tokenizer, tmp_path):
    corpus.write_bytes(corpus.read_bytes() + b"\xff\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="not UTF-8"):
            cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    assert not without_locks(tmp_path / "cache")


def test_a_line_without_tokens_is_not_a_document(tmp_path, monkeypatch):
    corpus = write(tmp_path / "text", "x\nabc\nx\nabc\n")
    tokenizer = Tokenizer(train_tokenizer(corpus, "char", 0))
    x, encode = tokenizer.pieces.index("x"), tokenizer.encode_all
    monkeypatch.setattr(
        tokenizer, "encode_all", lambda texts: [ids[ids != x] for ids in encode(texts)]
    )
    assert cache.load_corpus(corpus, tokenizer, tmp_path / "cache").offsets.tolist() == [0, 3, 6]


def test_a_missing_or_empty_corpus_gives_a_clear_error(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no text file at"):
        cache.load_corpus(tmp_path / "missing", tokenizer, tmp_path)
    with pytest.raises(ValueError, match="has no text"):
        cache.load_corpus(write(tmp_path / "blank", "\n \n\n"), tokenizer, tmp_path)


# ---------------------------------------------------------------- what another has written


def test_a_corpus_that_changes_between_its_hash_and_its_reading_leaves_no_cache(
    tmp_path, monkeypatch
):
    corpus, model = tmp_path / "c.txt", tmp_path / "model"
    corpus.write_text("a b c\n" * 50)
    model.write_bytes(train_tokenizer(corpus, "char"))
    tokenizer = load_tokenizer(model)
    real = cache.text_key

    def changed(*inputs):
        key = real(*inputs)
        corpus.write_text("c b a\n" * 51)
        return key

    monkeypatch.setattr(cache, "text_key", changed)
    with pytest.raises(ValueError, match="has changed while it was read: run again"):
        cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_the_cache_of_another_user_is_refused(tmp_path, monkeypatch):
    corpus, model = tmp_path / "c.txt", tmp_path / "model"
    corpus.write_text("a b c\n" * 50)
    model.write_bytes(train_tokenizer(corpus, "char"))
    tokenizer = load_tokenizer(model)
    cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    monkeypatch.setattr(os, "getuid", lambda: os.stat(corpus).st_uid + 1)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    if os.stat(folder).st_uid:
        with pytest.raises(ValueError, match="belongs to another user: give another --cache_dir"):
            cache.load_corpus(corpus, tokenizer, tmp_path / "cache")
    real = os.stat
    other = SimpleNamespace(st_uid=4321)
    monkeypatch.setattr(os, "stat", lambda *a, **b: other if a[0] == folder else real(*a, **b))
    with pytest.raises(ValueError, match="belongs to another user: give another --cache_dir"):
        cache.load_corpus(corpus, tokenizer, tmp_path / "cache")


def test_one_wrong_digit_in_the_remembered_hashes_is_found(tmp_path, monkeypatch):
    corpus = tmp_path / "c.txt"
    corpus.write_text("a b c\n" * 50)
    os.utime(corpus, (1e9, 1e9))  # else it may change once more
    monkeypatch.setattr(cache, "LARGE_BYTES", 0)
    right = cache.content_hash(Corpus(str(corpus)), tmp_path)
    memory = tmp_path / "hashes.json"
    wrong = memory.read_text().replace(right, right[:-1] + ("0" if right[-1] != "0" else "1"))
    assert wrong != memory.read_text()
    memory.write_text(wrong)
    assert cache.content_hash(Corpus(str(corpus)), tmp_path) == right
