"""A text in one file or in many, plain, packed or as objects: the examples are the same."""

import gzip
import json
import os

import numpy as np
import pytest

from documents import Corpus, find_files
from text import default_vocab_size, read_part, read_pieces, train_tokenizer

TEXTS = ["one\ntwo\n\nthree", "", "fo\u00fcr\n", "  five six\n\n\nseven"]
EXAMPLES = {
    "line": ["one", "two", "three", "fo\u00fcr", "  five six", "seven"],
    "paragraph": ["one\ntwo", "three", "fo\u00fcr", "  five six", "seven"],
    "file": ["one\ntwo\n\nthree", "fo\u00fcr", "  five six\n\n\nseven"],
}


def objects(texts, field="text"):
    return "\n\n".join(json.dumps({"id": 5, field: text}) for text in texts) + "\n"


def write(path, text):
    """Write a text, packed if the name ends in .gz."""
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return str(path)


@pytest.fixture
def corpora(tmp_path):
    """The same texts in several forms: {form: Corpus}."""
    for form in ("txt", "txt.gz"):
        (tmp_path / form).mkdir()
        for i, text in enumerate(TEXTS):
            write(tmp_path / form / f"{i}.{form}", text)
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed" / "a.jsonl", objects(TEXTS[:2]))
    write(tmp_path / "mixed" / "b.txt", TEXTS[2])
    write(tmp_path / "mixed" / "c.jsonl.gz", objects(TEXTS[3:]))
    write(tmp_path / "mixed" / "notes.md", "not read")
    return {
        "folder": Corpus(str(tmp_path / "txt")),
        "pattern": Corpus(str(tmp_path / "txt.gz" / "?.txt.*")),
        "list": Corpus(f"{tmp_path / 'txt' / '0.txt'},{tmp_path / 'txt' / '[123].txt'}"),
        "objects": Corpus(write(tmp_path / "a.jsonl", objects(TEXTS, "content")), "content"),
        "packed objects": Corpus(write(tmp_path / "a.jsonl.gz", objects(TEXTS))),
        "mixed": Corpus(str(tmp_path / "mixed")),
    }


def read(corpus, example="line", part="all", **options):
    pieces = read_part(corpus, part, example) if part != "all" else read_pieces(corpus, example, **options)
    texts = []
    for piece in pieces:
        texts += [""] * piece.first
        texts[-1] += piece.text
    return texts


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_are_the_same_in_every_form(corpora, example):
    """An example never reaches from one document into the next."""
    for corpus in corpora.values():
        assert read(corpus, example) == EXAMPLES[example] == read(corpus, example, max_bytes=9)
        assert corpus.n_bytes == sum(len(text.encode()) for text in TEXTS)


def test_the_parts_of_a_few_examples_are_the_same_in_every_form_and_together_the_whole(corpora):
    for part in ("train", "val"):
        assert len({tuple(read(corpus, part=part)) for corpus in corpora.values()}) == 1
    for example, texts in EXAMPLES.items():
        train, val = (read(corpora["mixed"], example, part) for part in ("train", "val"))
        assert val and "".join("".join(train + val).split()) == "".join("".join(texts).split())


@pytest.mark.parametrize("start, stop", [(0, 3), (4, 9), (5, 16), (13, 24), (14, 14), (30, 99)])
def test_positions_count_the_bytes_of_all_documents(corpora, start, stop):
    whole = "".join(TEXTS).encode()
    for corpus in corpora.values():
        text = "".join(read(corpus, "file", start=start, stop=stop))
        assert text.split() == whole[start:stop].decode().split()


def test_a_tokenizer_and_the_size_of_its_vocabulary_do_not_depend_on_the_form(tmp_path):
    lines = [f"the {i} kings sleep" for i in range(9000)]
    plain = write(tmp_path / "a.txt", "\n".join(lines))
    write(tmp_path / "b.txt.gz", "\n".join(lines[:400]))
    write(tmp_path / "c.jsonl", objects(lines[400:]))
    corpus = f"{tmp_path / 'b.txt.gz'},{tmp_path / 'c.jsonl'}"
    assert default_vocab_size(plain, "bpe") == default_vocab_size(corpus, "bpe") == 1024
    assert train_tokenizer(plain, "bpe", 300) == train_tokenizer(corpus, "bpe", 300)


def test_a_file_of_any_name_is_read_as_it_is_and_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "b.txt", "c[1].txt"):
        write(tmp_path / name, "text\n")
    assert find_files("a,b") == ["a,b"] and find_files("c[1].txt") == ["c[1].txt"]
    assert find_files("b.txt,*.txt") == ["b.txt", "c[1].txt"] and len(find_files(".")) == 2


@pytest.mark.parametrize("path", ["missing.txt", "a.txt,missing.txt", "*.csv", "folder", "a.txt,"])
def test_a_part_that_names_no_file_is_an_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no text file at"):
        find_files(path)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"', "is not JSON"),
        ('{"body": "a", "title": 5}', "has no text in a field 'text' .its fields are body, title.: give --text_field"),
        ('{"text": 5}', "has no text"),
        ('["text"]', "its fields are none"),
        ('{"text": "\\ud83d"}', "is not Unicode: surrogates"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_an_error_in_an_object_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3 .*{message}"):
        read(path)


def test_an_error_in_one_of_many_files_names_it(tmp_path):
    write(tmp_path / "a.txt", "fine\n")
    (tmp_path / "b.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8: byte 8 is 0xe9, in line 2"):
        read(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_gz_file_is_named(tmp_path, damage):
    packed = bytearray(gzip.compress(np.random.default_rng(0).integers(97, 123, 50_000, dtype=np.uint8).tobytes()))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    else:
        packed[len(packed) // 2] ^= 255
    (tmp_path / "a.txt.gz").write_bytes(packed)
    for function in (read, lambda path: Corpus.of(path).n_bytes):
        with pytest.raises(ValueError, match=r"a\.txt\.gz is damaged or not a \.gz file"):
            function(os.fspath(tmp_path / "a.txt.gz"))
