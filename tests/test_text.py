"""Reading text files, and tokenizers."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

from text import cache
from text.reading import HEAD, Corpus, check_separator, find_separator, read_part, read_pieces, reading_notes
from text.tokenizer import add_marks, default_vocab_size, keeps_breaks, load_tokenizer, train_tokenizer

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


@pytest.mark.parametrize("max_bytes", [9, 1 << 16])
def test_paragraphs_are_separated_by_blank_lines_and_keep_their_line_breaks(tmp_path, max_bytes):
    path = write(tmp_path / "text", "\n\none\n  two \n\n\n \t\nthree\n\nfour\nfive")
    paragraphs = ["one\n  two ", "three", "four\nfive"]
    assert read(path, example="paragraph", max_bytes=max_bytes) == paragraphs
    assert sum(p.n_bytes for p in read_pieces(path, "paragraph")) == sum(map(len, paragraphs))


MARKS = "<|endoftext|>", "---", "* * *", "%", "\u2014\u2014\u2014", "THE END OF A STORY"
STORIES = ["one\n\n  two ", "three %% --- <|endoftext|>", "four\n* * *five", "s\u00edx"]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("max_bytes", [9, 11, 14, 1 << 16])
@pytest.mark.parametrize("around", ["", "\n", "\r\n \r\n"], ids=["no", "blank", "CRLF"])
def test_examples_stand_between_separators_that_are_lines_by_themselves(
    tmp_path, mark, max_bytes, around
):
    """Wherever a read ends, with blank lines around them or not, at both ends of the file too."""
    between = f"\n{around}{mark}\n {mark}\t\n{around}"
    path = write(tmp_path / "text", f"{mark}\n" + between.join(STORIES) + f"\n{mark}")
    found = read(path, example=mark, max_bytes=max_bytes)
    assert [text.rstrip() for text in found] == [text.rstrip() for text in STORIES]
    for piece in read_pieces(path, mark, max_bytes=max_bytes):
        if piece.last:  # reading goes on after any example
            rest = read(path, example=mark, start=piece.end, max_bytes=max_bytes)
            assert rest == found[piece.number + 1 :]


def test_a_separator_is_not_cut_where_the_validation_part_begins(tmp_path):
    path = write(tmp_path / "text", "\n* * *\n".join(f"story {i}" for i in range(90)))
    parts = [read(path, example="* * *")]
    for part in ("train", "val"):
        parts.append([piece.text for piece in read_part(path, part, "* * *")])
    assert parts[0] == parts[1] + parts[2] and 2 < len(parts[2]) < 9


@pytest.mark.parametrize("mark", [*MARKS[:5], "</s>", "[SEP]"])
def test_a_line_that_looks_like_a_separator_is_found_and_the_flag_named(tmp_path, mark):
    path = write(tmp_path / "text", f"\n{mark}\n".join(["Yes.\nYes.", "No!"] * 3))
    assert find_separator(path) == (mark, 5)
    (note,) = reading_notes(Corpus.of(path), "line")
    assert f"'{mark}' occurs 5 times" in note and f"--example={mark}" in note.replace("'--", "--")
    check_separator(path, mark)
    assert reading_notes(Corpus.of(path), mark) == []


@pytest.mark.parametrize("line", ["}", '"""', "...", "Yes.", "#", "a | b", "\u6f22"])
def test_lines_of_code_and_speech_are_not_taken_for_separators(tmp_path, line):
    assert find_separator(write(tmp_path / "text", f"\n{line}\n".join(["one", "two"] * 3))) is None


def test_a_long_text_of_wide_characters_is_searched_for_separators(tmp_path):
    """Its first megabyte ends within a character."""
    path = write(tmp_path / "text", "---\n" * 3 + ("\u6f22" * 3001 + "\n") * 150)
    assert find_separator(path) == ("---", 3)


def test_a_separator_that_no_line_is_gets_one_line_with_the_way_out(tmp_path):
    path = write(tmp_path / "text", "one<|endoftext|>two <|endoftext|>three\n")
    with pytest.raises(ValueError, match=r"it stands within lines: .* with sed 's/<\|endo.*/g'$"):
        check_separator(path, "<|endoftext|>")
    for typo in ("lines", " "):
        with pytest.raises(ValueError, match="no line of .* is '.*': --example is line, lab"):
            check_separator(path, typo)


def test_a_whole_file_is_one_example(tmp_path):
    text = "one\n\n  two\n\n\nthree"
    assert read(write(tmp_path / "text", text + "\n"), example="file") == [text]
    assert read(write(tmp_path / "text", text.replace("\n", "\r\n")), example="file") == [text]


def test_a_long_example_without_spaces_is_cut_between_its_lines(tmp_path):
    """Also between \\r and \\n, which must not come apart."""
    lines = ["\u6f22\u5b57" * 2] * 9
    for line_break in ("\n", "\r\n"):
        path = write(tmp_path / "text", line_break.join(lines))
        pieces = list(read_pieces(path, "file", max_bytes=30))
        assert "".join(piece.text for piece in pieces) == "\n".join(lines) and len(pieces) > 3
        assert all(piece.text.endswith("\n") for piece in pieces[:-1])


@pytest.mark.parametrize("example", ["line", "paragraph", "file"])
def test_the_error_for_text_that_is_not_utf8_counts_bytes_from_the_start_of_the_file(tmp_path, example):
    (tmp_path / "latin").write_bytes(b"fine\r\n\n" * 300 + b"caf\xe9\n")
    with pytest.raises(ValueError, match="byte 2103 is 0xe9"):
        list(read_pieces(tmp_path / "latin", example, max_bytes=64))


def test_the_error_for_text_that_is_not_utf8_names_the_first_wrong_byte(tmp_path):
    (tmp_path / "latin").write_bytes(b"fine\n" * 3 + "café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin is not UTF-8: byte 18 is 0xe9, in line 4\. .*iconv"):
        read(tmp_path / "latin")


@pytest.mark.parametrize("example", ["line", "paragraph", "file"])
@pytest.mark.parametrize("text", ["a line\n" * 500, "word " * 50_000, "é" * 5000, "one two\n" * 20, "one\n\ntwo\n\n" * 99])
def test_train_and_val_together_are_the_whole_corpus(tmp_path, text, example):
    """The texts: many lines, one very long line with spaces and one without, few lines, many paragraphs."""
    path = write(tmp_path / "text", text)
    n_chars = {}
    for part in ("all", "train", "val"):
        n_chars[part] = sum(len("".join(p.text.split())) for p in read_part(path, part, example))
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


LINES = ["KING:\nWho's there?  \n\n    An indented line,\tand a tab.", "one\u2028two\x0b\x0c\x1c\x85three\n"]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_examples_of_several_lines_decode_to_exactly_the_text_and_a_line_break_is_one_token(tmp_path, kind):
    path = write(tmp_path / "text", "\n\n".join(LINES * 20))
    (tmp_path / "model").write_bytes(train_tokenizer(path, kind, 400, "file"))
    tokenizer = load_tokenizer(tmp_path / "model")
    line_break = tokenizer.piece_to_id("\n")
    for text in LINES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids).encode() == text.encode() and tokenizer.unk_id() not in ids
        assert ids.count(line_break) == text.count("\n")
    assert keeps_breaks(tokenizer)


SENTENCES = [
    'He said: "Yes, sir." (Or "no"?) It was 3.50!',
    "Don't stop-it... she's well, 'twas all;and more",
    "a , b ,c / d",
    '"What?!" -- "No."',
    ". , !",
]


def test_a_word_tokenizer_keeps_punctuation_apart_and_restores_the_spacing(tmp_path):
    path = write(tmp_path / "text", "\n".join(SENTENCES * 20))
    (tmp_path / "model").write_bytes(train_tokenizer(path, "word", 400))
    tokenizer = load_tokenizer(tmp_path / "model")
    for text in SENTENCES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("Yes sir.")[:-1] == tokenizer.encode("Yes sir")
    assert tokenizer.encode("sir, Yes")[0] == tokenizer.encode("sir")[0]


def test_a_word_tokenizer_is_trained_on_a_text_with_a_very_long_word(tmp_path):
    """Whose rest, after it was cut, is empty."""
    path = write(tmp_path / "text", "one, two\n" * 30 + "=" * 1000 + "\n")
    assert train_tokenizer(path, "word", 400)


def test_a_word_tokenizer_has_a_token_for_line_breaks(tmp_path):
    path = write(tmp_path / "text", "KING:\nWho is there?\nNo one.\n\nSecond KING.\n" * 20)
    (tmp_path / "model").write_bytes(train_tokenizer(path, "word", 400, "paragraph"))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert keeps_breaks(tokenizer) and tokenizer.unk_id() not in tokenizer.encode("KING:\nNo one.\nWho is there?")
    for text in ("KING:\nWho is there?\nNo one.", "\nNo one\n\n", "KING\nSecond"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_tokenizer_of_text_without_punctuation_has_words_only(tmp_path):
    path = write(tmp_path / "text", "the king's old-boat sleeps\n" * 20)
    (tmp_path / "model").write_bytes(train_tokenizer(path, "word", 400))
    tokenizer = load_tokenizer(tmp_path / "model")
    pieces = {tokenizer.id_to_piece(k) for k in range(3, len(tokenizer))}
    assert pieces == {"\u2581" + word for word in ("the", "king's", "old-boat", "sleeps")} and not keeps_breaks(tokenizer)


@pytest.mark.parametrize("bos, eos", [(1, 2), (1, -1), (-1, 2), (-1, -1)])
def test_bos_and_eos_are_added_only_if_the_tokenizer_has_them_and_they_are_asked_for(bos, eos):
    tokenizer = SimpleNamespace(bos_id=lambda: bos, eos_id=lambda: eos)
    before, after = [bos] * (bos >= 0), [eos] * (eos >= 0)
    ids = [5, 6]
    assert add_marks(ids, tokenizer) == before + [5, 6] + after
    assert add_marks(ids, tokenizer, begin=False) == [5, 6] + after
    assert add_marks(ids, tokenizer, end=False) == before + [5, 6]
    assert add_marks([], tokenizer) == before + after and ids == [5, 6]


@pytest.mark.parametrize("text", ["a", "\u00e9", "\U0001f600"])
def test_a_corpus_of_one_character_is_too_short_for_two_parts_and_not_called_broken(tmp_path, text):
    path = write(tmp_path / "text", text)
    (tmp_path / "model").write_bytes(train_tokenizer(path, "char", 300))
    with pytest.raises(ValueError, match="no text for the part 'train': it is too short"):
        cache.load_corpus(path, tmp_path / "model", tmp_path, "train")


def test_a_tokenizer_that_leaves_a_letter_out_can_be_used(tmp_path):
    """Nothing is left of an a, and no command may rely on it."""
    path, model = write(tmp_path / "text", "the king sleeps\nanna\n" * 60), io.BytesIO()
    (tmp_path / "rules").write_text("61\t\n")
    options = dict(model_type="bpe", vocab_size=40, hard_vocab_limit=False, normalization_rule_tsv=tmp_path / "rules", minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(input=path, model_writer=model, **options)
    (tmp_path / "model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.decode(tokenizer.encode("anna")) == "nn" and not keeps_breaks(tokenizer)
    assert len(cache.load_corpus(path, tmp_path / "model", tmp_path).lengths) == 120


@pytest.mark.parametrize("n_bytes, size", [(100, 512), (200_000, 1024), (2_000_000, 8192), (90_000_000, 8192)])
def test_the_vocabulary_grows_with_the_corpus(tmp_path, n_bytes, size):
    with open(tmp_path / "text", "wb") as file:
        file.write(b"a" * min(n_bytes, HEAD))
        file.truncate(n_bytes)
    assert default_vocab_size(tmp_path / "text", "bpe") == size and default_vocab_size(tmp_path / "text", "word") == 8192


def sizes(path, kind, example="line"):
    """Train a tokenizer -> the size that was chosen, and the least that is named when 2 is asked."""
    model = train_tokenizer(path, kind, example=example)
    with pytest.raises(ValueError, match=rf"no {kind} tokenizer with --vocab_size=2 from") as error:
        train_tokenizer(path, kind, 2, example)
    n = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    return n, int(str(error.value).removesuffix(" or more").split()[-1])


@pytest.mark.parametrize("first", [0x4E00, 0xAC00, 0x1F300], ids=["Chinese", "Korean", "emoji"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_chosen_vocabulary_has_room_for_all_characters(tmp_path, kind, first):
    """700 of them, where the size of the text asks for 512 tokens."""
    characters = [chr(first + n) for n in range(700)]
    lines = ["".join(characters[i:] + characters[:i]) for i in (0, 9)]
    path = write(tmp_path / "text", "\n".join(lines))
    assert default_vocab_size(path, kind) == 512
    n, least = sizes(path, kind)
    assert least == 700 + 259 and least <= n <= 1024


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word"])
def test_the_least_vocabulary_that_is_named_works_and_one_less_does_not(tmp_path, kind):
    lines = [f"label {n % 30}\tthe \u738b sleeps {n}" for n in range(90)]
    path = write(tmp_path / "text", "\n".join(lines))
    _, least = sizes(path, kind, "labelled")
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_proto=train_tokenizer(path, kind, least, "labelled")
    )
    assert len(tokenizer) == least
    with pytest.raises(ValueError, match=f"{least} or more"):
        train_tokenizer(path, kind, least - 1, "labelled")


@pytest.mark.parametrize("text", ["a" * 5000, "ab\n" * 500, "!\n" * 50, "a b " * 90])
@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "word"])
def test_a_text_of_hardly_any_characters_gets_a_vocabulary_that_it_can_fill(tmp_path, text, kind):
    path = write(tmp_path / "text", text)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(path, kind))
    assert len(tokenizer) < 300


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
    with pytest.raises(ValueError, match=r"^\S+latin is not UTF-8: byte 8003 is 0xe9, in line 501\. Convert it[^:]*$"):
        train_tokenizer(tmp_path / "latin", kind, 300)
