"""Reading text files, and tokenizers."""

from types import SimpleNamespace

import numpy as np
import pytest

from text import add_marks, load_tokenizer, read_part, read_pieces, train_tokenizer

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


def read(path, **kwargs):
    """Read the pieces of a file and join them -> list of lines."""
    lines = []
    for piece in read_pieces(path, **kwargs):
        if piece.first:
            lines.append("")
        lines[-1] += piece.text
    return lines


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("max_bytes", [9, 64, 1 << 16])
@pytest.mark.parametrize("ending", ["", "\n"])
def test_joined_pieces_are_the_lines_of_the_file(tmp_path, max_bytes, ending):
    path = write(tmp_path / "text", "\n".join(UNICODE) + ending)
    assert read(path, max_bytes=max_bytes) == UNICODE
    assert sum(p.n_bytes for p in read_pieces(path, max_bytes=max_bytes)) == sum(len(x.encode()) for x in UNICODE)


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_skipped(tmp_path):
    assert read(write(tmp_path / "text", "\ufeffone\r\n\r\n   \ntwo\n\n\n")) == ["one", "two"]
    assert read(write(tmp_path / "empty", "")) == []


def test_the_error_for_text_that_is_not_utf8_names_the_first_wrong_byte(tmp_path):
    (tmp_path / "latin").write_bytes(b"fine\n" * 3 + "café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin is not UTF-8: byte 18 is 0xe9.*iconv"):
        read(tmp_path / "latin")


@pytest.mark.parametrize("text", ["a line\n" * 500, "word " * 50_000, "é" * 5000, "one two\n" * 20])
def test_train_and_val_together_are_the_whole_corpus(tmp_path, text):
    """The texts: many lines, one very long line with spaces and one without, few lines."""
    path = write(tmp_path / "text", text)
    n_chars = {part: sum(len(p.text) for p in read_part(path, part)) for part in ("all", "train", "val")}
    assert n_chars["train"] + n_chars["val"] == n_chars["all"]
    assert 0.01 < n_chars["val"] / n_chars["all"] < 0.08


def test_a_corpus_of_repeating_lines_has_each_of_them_held_out_sometimes(tmp_path):
    path = write(tmp_path / "text", "".join(f"{i}\n" for i in range(20_000)))
    held_out = np.array([int(p.text) for p in read_part(path, "val")])
    assert len(held_out) == pytest.approx(400, abs=3)
    for period in (2, 3, 10, 50):
        assert np.bincount(held_out % period, minlength=period).min() > 0


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_bpe_and_unigram_decode_to_exactly_the_text_that_was_encoded(tmp_path, kind):
    path = write(tmp_path / "text", "\n".join(UNICODE * 20))
    (tmp_path / "model").write_bytes(train_tokenizer(path, kind, 600))
    tokenizer = load_tokenizer(tmp_path / "model")
    for line in [*UNICODE, "ΩЖ漢 never seen before 🦩"]:
        assert tokenizer.decode(tokenizer.encode(line)) == line


def test_a_character_tokenizer_has_only_the_characters_and_unk(tmp_path):
    path = write(tmp_path / "text", "the quick brown fox jumps over a lazy dog " * 30)
    (tmp_path / "model").write_bytes(train_tokenizer(path, "char", 0))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert len(tokenizer) == 28 and tokenizer.bos_id() == tokenizer.eos_id() == -1
    assert tokenizer.decode(tokenizer.encode(" a  lazy fox ")) == " a  lazy fox "


@pytest.mark.parametrize("bos, eos", [(1, 2), (1, -1), (-1, 2), (-1, -1)])
def test_bos_and_eos_are_added_only_if_the_tokenizer_has_them_and_they_are_asked_for(bos, eos):
    tokenizer = SimpleNamespace(bos_id=lambda: bos, eos_id=lambda: eos)
    before, after = [bos] * (bos >= 0), [eos] * (eos >= 0)
    ids = [5, 6]
    assert add_marks(ids, tokenizer) == before + [5, 6] + after
    assert add_marks(ids, tokenizer, begin=False) == [5, 6] + after
    assert add_marks(ids, tokenizer, end=False) == before + [5, 6]
    assert add_marks([], tokenizer) == before + after and ids == [5, 6]


def test_a_tokenizer_that_cannot_be_built_or_read_gives_a_clear_error(tmp_path):
    path = write(tmp_path / "text", "".join(map(chr, range(0x4E00, 0x5000))))
    with pytest.raises(ValueError, match="no bpe tokenizer with --vocab_size=20"):
        train_tokenizer(path, "bpe", 20)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_training_a_tokenizer_on_text_that_is_not_utf8_says_only_that(tmp_path, kind):
    (tmp_path / "latin").write_bytes(b"the king sleeps\n" * 500 + b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"^\S+latin is not UTF-8: byte 8003 is 0xe9\. Convert it[^:]*$"):
        train_tokenizer(tmp_path / "latin", kind, 300)
