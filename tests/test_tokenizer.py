"""Tokenizers: what is kept, what is one token, how large the vocabulary is."""

import io
from types import SimpleNamespace

import pytest
import sentencepiece
from untrained import UNICODE

from text import cache
from text.reading import HEAD
from text.tokenizer import (
    Tokenizer,
    default_vocab_size,
    load_tokenizer,
    train_tokenizer,
)


def write(path, text):
    path.write_bytes(text.encode())
    return path


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
    assert len(tokenizer) == 28 and tokenizer.bos == tokenizer.eos == -1
    assert tokenizer.decode(tokenizer.encode(" a  lazy fox ")) == " a  lazy fox "


LINES = [
    "KING:\nWho's there?  \n\n    An indented line,\tand a tab.",
    "one\u2028two\x0b\x0c\x1c\x85three\n",
]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_examples_of_several_lines_decode_to_exactly_the_text_and_a_line_break_is_one_token(
    tmp_path, kind
):
    path = write(tmp_path / "text", "\n\n".join(LINES * 20))
    (tmp_path / "model").write_bytes(train_tokenizer(path, kind, 400, "file"))
    tokenizer = load_tokenizer(tmp_path / "model")
    line_break = tokenizer.pieces.index("\n")
    for text in LINES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids).encode() == text.encode() and tokenizer.unk not in ids
        assert ids.count(line_break) == text.count("\n")
    assert tokenizer.keeps_breaks()


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
    assert tokenizer.keeps_breaks() and tokenizer.unk not in tokenizer.encode(
        "KING:\nNo one.\nWho is there?"
    )
    for text in ("KING:\nWho is there?\nNo one.", "\nNo one\n\n", "KING\nSecond"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_tokenizer_of_text_without_punctuation_has_words_only(tmp_path):
    path = write(tmp_path / "text", "the king's old-boat sleeps\n" * 20)
    (tmp_path / "model").write_bytes(train_tokenizer(path, "word", 400))
    tokenizer = load_tokenizer(tmp_path / "model")
    pieces = {tokenizer.pieces[k] for k in range(3, len(tokenizer))}
    assert (
        pieces == {"\u2581" + word for word in ("the", "king's", "old-boat", "sleeps")}
        and not tokenizer.keeps_breaks()
    )


@pytest.mark.parametrize("bos, eos", [(1, 2), (1, -1), (-1, 2), (-1, -1)])
def test_bos_and_eos_are_added_only_if_the_tokenizer_has_them_and_they_are_asked_for(bos, eos):
    tokenizer = SimpleNamespace(bos=bos, eos=eos)
    before, after = [bos] * (bos >= 0), [eos] * (eos >= 0)
    ids = [5, 6]
    assert Tokenizer.add_marks(tokenizer, ids) == before + [5, 6] + after
    assert Tokenizer.add_marks(tokenizer, ids, begin=False) == [5, 6] + after
    assert Tokenizer.add_marks(tokenizer, ids, end=False) == before + [5, 6]
    assert Tokenizer.add_marks(tokenizer, []) == before + after and ids == [5, 6]


@pytest.mark.parametrize("text", ["a", "\u00e9", "\U0001f600"])
def test_a_corpus_of_one_character_is_too_short_for_two_parts_and_not_called_broken(tmp_path, text):
    path = write(tmp_path / "text", text)
    (tmp_path / "model").write_bytes(train_tokenizer(path, "char", 300))
    with pytest.raises(ValueError, match="no text for the part 'train': it is too short"):
        cache.load_corpus(path, load_tokenizer(tmp_path / "model"), tmp_path, "train")


def test_a_tokenizer_that_leaves_a_letter_out_can_be_used(tmp_path):
    """Nothing is left of an a, and no command may rely on it."""
    path, model = write(tmp_path / "text", "the king sleeps\nanna\n" * 60), io.BytesIO()
    (tmp_path / "rules").write_text("61\t\n")
    options = dict(
        model_type="bpe",
        vocab_size=40,
        hard_vocab_limit=False,
        normalization_rule_tsv=tmp_path / "rules",
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(input=path, model_writer=model, **options)
    (tmp_path / "model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.decode(tokenizer.encode("anna")) == "nn" and not tokenizer.keeps_breaks()
    tokens = cache.load_corpus(path, load_tokenizer(tmp_path / "model"), tmp_path)
    assert tokens.n_documents == 120


@pytest.mark.parametrize(
    "n_bytes, size", [(100, 512), (200_000, 1024), (2_000_000, 8192), (90_000_000, 8192)]
)
def test_the_vocabulary_grows_with_the_corpus(tmp_path, n_bytes, size):
    with open(tmp_path / "text", "wb") as file:
        file.write(b"a" * min(n_bytes, HEAD))
        file.truncate(n_bytes)
    assert (
        default_vocab_size(tmp_path / "text", "bpe") == size
        and default_vocab_size(tmp_path / "text", "word") == 8192
    )


def sizes(path, kind, example="line"):
    """Train a tokenizer -> its size, and the least size that is named when 2 is asked for."""
    model = train_tokenizer(path, kind, example=example)
    with pytest.raises(ValueError, match=rf"no {kind} tokenizer with --vocab_size=2 from") as error:
        train_tokenizer(path, kind, 2, example)
    n = len(Tokenizer(model))
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
    tokenizer = Tokenizer(train_tokenizer(path, kind, least, "labelled"))
    assert len(tokenizer) == least
    with pytest.raises(ValueError, match=f"{least} or more"):
        train_tokenizer(path, kind, least - 1, "labelled")


@pytest.mark.parametrize("text", ["a" * 5000, "ab\n" * 500, "!\n" * 50, "a b " * 90])
@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "word"])
def test_a_text_of_hardly_any_characters_gets_a_vocabulary_that_it_can_fill(tmp_path, text, kind):
    path = write(tmp_path / "text", text)
    tokenizer = Tokenizer(train_tokenizer(path, kind))
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
    with pytest.raises(
        ValueError,
        match=r"^\S+latin is not UTF-8: byte 8003 is 0xe9, in line 501\. Convert it[^:]*$",
    ):
        train_tokenizer(tmp_path / "latin", kind, 300)
