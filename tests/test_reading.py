"""Reading texts: their files, the examples in them, and the parts of a corpus."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import sqlite3
import subprocess
import tarfile
import zipfile
from collections import Counter
from functools import partial

import numpy as np
import pytest
from untrained import UNICODE

from text import cache, reading
from text.reading import (
    Corpus,
    check_separator,
    find_files,
    find_separator,
    left_out,
    lines_of,
    read_part,
    read_pieces,
    reading_notes,
)
from text.tokenizer import default_vocab_size, train_tokenizer

TEXTS = ["one\ntwo\n\nthree", "", "fo\u00fcr\n", "  five six\n\n\nseven"]
EXAMPLES = {
    "line": ["one", "two", "three", "fo\u00fcr", "  five six", "seven"],
    "paragraph": ["one\ntwo", "three", "fo\u00fcr", "  five six", "seven"],
    "file": ["one\ntwo\n\nthree", "fo\u00fcr", "  five six\n\n\nseven"],
}


def objects(texts, field="text"):
    return "\n\n".join(json.dumps({"id": 5, field: text}) for text in texts) + "\n"


def write(path, content):
    """Write bytes, or a text, which is packed if the name ends in .gz -> its path, a str."""
    if isinstance(content, str):
        content = content.encode()
        content = gzip.compress(content) if path.name.endswith(".gz") else content
    path.write_bytes(content)
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
    pieces = (
        read_part(corpus, part, example)
        if part != "all"
        else read_pieces(corpus, example, **options)
    )
    texts = []
    for piece in pieces:
        texts += [""] * piece.first
        texts[-1] += piece.text
    return texts


# ---------------------------------------------------------------- files


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
        (
            '{"body": "a", "title": 5}',
            "has no text in a field 'text' .its fields are body, title.: give --text_field",
        ),
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
    packed = bytearray(
        gzip.compress(np.random.default_rng(0).integers(97, 123, 50_000, dtype=np.uint8).tobytes())
    )
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    else:
        packed[len(packed) // 2] ^= 255
    (tmp_path / "a.txt.gz").write_bytes(packed)
    for function in (read, lambda path: Corpus.of(path).n_bytes):
        with pytest.raises(ValueError, match=r"a\.txt\.gz is damaged or not a \.gz file"):
            function(os.fspath(tmp_path / "a.txt.gz"))


# ---------------------------------------------------------------- files that are not what they seem

LINES = "the king sleeps\ncaf\u00e9 \u0416 \u6f22\n\nanna sees\n"
RECORDS = [dict(text=line) for line in LINES.split("\n") if line]
gzipped = partial(gzip.compress, mtime=0)  # names of tests must not change
PACKERS = gzip.compress, bz2.compress, lzma.compress


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["\\n", "\\r\\n", "\\r"])
def test_a_text_with_a_mark_or_old_line_ends_is_read_right(tmp_path, encoding, line_end):
    path = write(tmp_path / "a.txt", LINES.replace("\n", line_end).encode(encoding))
    assert read(path) == LINES.split("\n")[:2] + ["anna sees"]
    assert read(path, "paragraph") == [LINES.split("\n\n")[0], "anna sees"]


@pytest.mark.parametrize(
    "mark, encoding", [(b"\xfe\xff", "utf-16-be"), (b"\0\0\xfe\xff", "utf-32-be")]
)
def test_big_endian_texts_are_read_right(tmp_path, mark, encoding):
    path = write(tmp_path / "a", mark + LINES.encode(encoding))
    assert read(path) == [record["text"] for record in RECORDS]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.TXT.XZ", "a"])
@pytest.mark.parametrize("pack", [bytes, *PACKERS])
def test_a_packed_text_is_read_whatever_its_name(tmp_path, name, pack):
    path = write(tmp_path / name, pack(LINES.encode()))
    assert read(path) == [record["text"] for record in RECORDS]


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.ndjson", "a.Json.gz"])
@pytest.mark.parametrize(
    "content",
    [
        objects([record["text"] for record in RECORDS]),
        json.dumps(RECORDS),
        "\n " + json.dumps(RECORDS, indent=2),
        json.dumps([record["text"] for record in RECORDS]),
        json.dumps(dict(text="".join(LINES)), indent=1),
    ],
    ids=["lines", "list", "indented list", "list of texts", "one indented object"],
)
def test_json_is_read_as_objects_on_lines_or_in_a_list(tmp_path, name, content):
    expected = [record["text"] for record in RECORDS]
    for raw in (content.encode(), content.encode("utf-8-sig"), content.encode("utf-16")):
        assert read(write(tmp_path / name, raw)) == expected


def test_the_content_of_a_file_that_is_read_otherwise_has_another_hash(tmp_path):
    """Else a cache of the same bytes, read as lines of text, would be taken."""
    content = b'{"text": "a"}\r{"text": "b"}'
    names = "a.txt", "a.json", "a.jsonl"
    paths = [write(tmp_path / name, content) for name in names]
    mac, *json_hashes = (cache.content_hash(Corpus(path), tmp_path) for path in paths)
    assert mac != cache.file_hash(paths[0]) and set(json_hashes) != {mac}
    plain = write(tmp_path / "b.txt", content.replace(b"\r", b"\n"))
    assert cache.content_hash(Corpus(plain), tmp_path) == cache.file_hash(plain)


@pytest.mark.parametrize(
    "name, content, command",
    [
        ("a b.txt", "caf\u00e9 no\u00ebl\n".encode("latin-1"), "iconv -f WINDOWS-1252 -t UTF-8"),
        ("a.jsonl", '{"text": "caf\u00e9"}\n'.encode("latin-1"), "iconv -f WINDOWS-1252 -t UTF-8"),
        ("a.gz", gzipped("caf\u00e9\n".encode("latin-1")), "iconv"),
        ("a.txt", LINES.encode("utf-16-le"), "iconv -f UTF-16LE"),
        ("a.txt", LINES.encode("utf-16-be"), "iconv -f UTF-16BE"),
        ("a.txt", b"the king\0 sleeps\n", "tr -d"),
        ("b.txt.gz", gzipped(b"the king\0 sleeps\n"), "tr -d"),
        ("a.gz", gzipped(gzipped(LINES.encode())), "gzip -dc"),
    ],
)
def test_the_command_that_is_named_makes_a_text_of_what_is_none(tmp_path, name, content, command):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert "\n" not in str(error.value) and path in str(error.value)
    line = re.search(r"(?:gzip|iconv|tr) -.*", str(error.value))[0]
    assert command in line
    subprocess.run(line, shell=True, check=True)
    new = path + (".jsonl" if ".jsonl" in name else ".txt")
    assert read(new) and not any("\0" in text or "\ufffd" in text for text in read(new))


def test_the_command_that_unpacks_objects_gives_them_a_name_of_objects(tmp_path):
    path = write(tmp_path / "a b.jsonl.lz4", b"\x04\x22\x4d\x18\0")
    with pytest.raises(ValueError, match=rf"run \w+ -dc < '{path}' > '{path}.jsonl'"):
        read(path)


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def database():
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (text)")
    return connection.serialize()


@pytest.mark.parametrize(
    "content, what",
    [
        (b"%PDF-1.4\n%\xe2", "a PDF, .*pdftotext"),
        (zipped("[Content_Types].xml", "word/document.xml"), "a document .*pandoc"),
        (zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel file.*read_excel"),
        (zipped("a.txt"), "a zip archive.*unzip"),
        (tarred(), "a tar archive.*tar -xf"),
        (gzipped(tarred()), "a tar archive.*tar -xf"),
        (gzipped(b"%PDF-1.4\n"), "a PDF.*gzip -dc .* first"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z .*7z x"),
        (database(), "a database.*sqlite3 -json"),
        (b"PAR1\x15\4\x15", "a parquet file.*mv .*parquet"),
        (b"ARROW1\0\0", "an arrow file.*mv .*arrow"),
        (b"\xff\xff\xff\xff\x10\2\0\0", "an arrow file.*mv .*arrow"),
        (b"\x89PNG\r\n\x1a\n\0", "a picture.*tesseract"),
        (b"\xff\xd8\xff\xe0\0", "a picture"),
        (b"\xd0\xcf\x11\xe0\xa1", "an old Office file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a link of Git LFS .*git lfs pull"),
    ],
)
def test_what_is_no_text_is_named_in_one_line_with_a_command(tmp_path, content, what):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(ValueError, match=rf"a\.txt is {what}") as error:
        read(path)
    assert "\n" not in str(error.value) and "{" not in str(error.value)


FORMATS = "%PDF files", "GIF89a is a format", "BZh9 is how", "PAR1 ", "RIFF and so on"


@pytest.mark.parametrize("text", FORMATS)
def test_a_text_that_speaks_of_formats_is_a_text(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text)) == [text]


def test_a_text_that_is_damaged_behind_its_mark_is_named(tmp_path):
    path = write(tmp_path / "a.txt", LINES.encode("utf-16") + b"x")
    with pytest.raises(ValueError, match="a.txt begins as UTF-16, but"):
        read(path)


def test_an_object_that_holds_a_list_of_objects_gets_the_command_that_unfolds_it(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(dict(version=1, data=RECORDS)))
    command = r"""jq -c '.\["data"\]\[\]' < .*a.json > .*a.json.jsonl"""
    with pytest.raises(ValueError, match=command):
        read(path)


def test_the_lines_of_a_small_file_are_read_as_those_of_a_corpus(tmp_path):
    path = write(tmp_path / "a", gzip.compress("one\r\n\r\ntwo\n".encode("utf-16")))
    assert lines_of(path) == [(1, "one"), (2, ""), (3, "two")]
    assert lines_of(write(tmp_path / "b", b"caf\xe9\x0c\x85")) == [(1, "caf\udce9\x0c\udc85")]


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    names = "a.TXT b.JSONL.GZ c.txt.xz ._a.txt .hidden d.md e.md f.json LICENSE"
    for name in names.split():
        write(tmp_path / name, "text\n")
    for name in ("sub", ".git"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_a_folder_is_searched_for_endings_without_case_and_not_for_hidden_files(folder):
    names = [os.path.basename(path) for path in find_files(str(folder))]
    assert names == ["a.TXT", "b.JSONL.GZ", "c.txt.xz"]


def test_what_a_folder_holds_besides_is_counted(folder):
    (line,) = left_out(str(folder))
    assert line.startswith("left out: hidden 3, .md 2, ") and line.endswith("/**/*.txt')")
    assert all(f"{reason} 1" in line for reason in ("subfolders", ".json", "without an ending"))
    assert left_out(f"{folder / 'a.TXT'},{folder / 'd.md'}") == [] == left_out(str(folder / "sub"))
    assert left_out(str(folder / "*"))[0].startswith("left out: subfolders 1 (")
    assert left_out(str(folder / "**")) == []


def test_the_number_of_files_examples_and_bytes_is_said(folder):
    corpus = Corpus(f"{folder / 'a.TXT'},{folder / 'c.txt.xz'}")
    assert corpus.describe(1234, 1) == f"{corpus}: 2 files, 1,234 examples, 1 byte"
    assert "3 files, 1 example, 9 bytes; left out: " in Corpus(str(folder)).describe(1, 9)


def test_a_folder_without_a_text_says_what_it_holds(folder):
    (folder / "sub" / "a.json").write_text("[]")
    found = r"no text file at .*searched for .txt, .*left out: .json 1 .*\*\.json"
    with pytest.raises(ValueError, match=found):
        find_files(str(folder / "sub"))
    for name in ("README", "LICENSE"):
        (folder / "sub" / name).write_text("text")
    with pytest.raises(ValueError, match=r"without an ending 2, .json 1 .*/\*\*/\*'"):
        find_files(str(folder / "sub"))


# ---------------------------------------------------------------- examples

@pytest.mark.parametrize("max_bytes", [9, 64, 1 << 16])
@pytest.mark.parametrize("ending", ["", "\n"])
def test_joined_pieces_are_the_lines_of_the_file(tmp_path, max_bytes, ending):
    path = write(tmp_path / "text", "\n".join(UNICODE) + ending)
    assert read(path, max_bytes=max_bytes) == UNICODE
    assert sum(p.n_bytes for p in read_pieces(path, max_bytes=max_bytes)) == sum(
        len(x.encode()) for x in UNICODE
    )


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
def test_the_error_for_text_that_is_not_utf8_counts_bytes_from_the_start_of_the_file(
    tmp_path, example
):
    (tmp_path / "latin").write_bytes(b"fine\r\n\n" * 300 + b"caf\xe9\n")
    with pytest.raises(ValueError, match="byte 2103 is 0xe9"):
        list(read_pieces(tmp_path / "latin", example, max_bytes=64))


def test_the_error_for_text_that_is_not_utf8_names_the_first_wrong_byte(tmp_path):
    (tmp_path / "latin").write_bytes(b"fine\n" * 3 + "café\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"latin is not UTF-8: byte 18 is 0xe9, in line 4\. .*iconv"
    ):
        read(tmp_path / "latin")


@pytest.mark.parametrize("example", ["line", "paragraph", "file"])
@pytest.mark.parametrize(
    "text",
    ["a line\n" * 500, "word " * 50_000, "é" * 5000, "one two\n" * 20, "one\n\ntwo\n\n" * 99],
)
def test_train_and_val_together_are_the_whole_corpus(tmp_path, text, example):
    """Many lines, one very long line with spaces and one without, few lines, many paragraphs."""
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


def test_a_file_is_read_once_however_it_is_reached(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a\n")
    (folder / "sub" / "b.txt").write_text("b\n")
    (folder / "sub" / "parent").symlink_to(folder)
    found = find_files(f"{folder}/**/*.txt")
    assert [os.path.basename(path) for path in found] == ["a.txt", "b.txt"]
    path = folder / "sub" / "a.txt"
    assert find_files(f"{path},{folder}/./sub/a.txt,{folder}/sub/../sub/b.txt")[0] == str(path)
    assert len(find_files(f"{path},{folder}/./sub/a.txt,{folder}/sub/../sub/b.txt")) == 2


def test_control_characters_of_labels_are_written_with_a_backslash():
    (line,) = reading.list_labels(Counter({"a\x1b[31mred": 3}))
    assert "\x1b" not in line and "a\\x1b[31mred 3" in line
