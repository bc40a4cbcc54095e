"""Tables as texts: a column of csv, parquet and arrow files, and of saved datasets."""

import csv
import gzip
import json

import numpy as np
import pytest

from text import cache, reading
from text.reading import Corpus, find_files, read_pieces
from text.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["one, two", 'a "quoted" text', "", "naïve\nline", "日本語"]
LINES = ["one, two", 'a "quoted" text', "naïve", "line", "日本語"]
pa = pytest.importorskip("pyarrow")


def write_csv(path):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *enumerate(TEXTS)])


def table():
    return pa.table({"n": list(range(len(TEXTS))), "text": [text or None for text in TEXTS]})


def write(path):
    """Write TEXTS as the kind of file that the name says."""
    import pyarrow.parquet

    ending = "".join(path.suffixes)
    if ending == ".csv":
        write_csv(path)
    elif ending == ".csv.gz":
        write_csv(path.with_suffix(""))
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
        path.with_suffix("").unlink()
    elif ending == ".parquet":
        pyarrow.parquet.write_table(table(), path, row_group_size=2)
    elif ending == ".feather":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table().schema) as writer:
            writer.write_table(table(), max_chunksize=2)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table().schema) as writer:
            writer.write_table(table(), max_chunksize=2)
    return path


KINDS = [".csv", ".csv.gz", ".parquet", ".arrow", ".feather"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_a_table_is_the_text(tmp_path, kind):
    corpus = Corpus(str(write(tmp_path / f"t{kind}")), "text")
    assert [piece.text for piece in read_pieces(corpus)] == LINES
    assert corpus.n_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_another_column_is_named_in_the_error(tmp_path, kind):
    corpus = Corpus(str(write(tmp_path / f"t{kind}")), "body")
    with pytest.raises(ValueError, match=r"no column 'body' \(its columns are n, text\): give"):
        list(read_pieces(corpus))


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    (tmp_path / "t.tsv").write_text('n\ttext\n1\t"Hello\n2\tthere"\n')
    corpus = Corpus(str(tmp_path / "t.tsv"), "text")
    assert [piece.text for piece in read_pieces(corpus)] == ['"Hello', 'there"']
    assert reading.kind_of("t.tsv", "text") != reading.kind_of("t.csv", "text")


@pytest.mark.parametrize(
    "content, message",
    [
        ("id,text\n1,Hello, world\n", "line 2 is no row: 3 cells, the header has 2"),
        ("id,text\n1,a\n2\n", "line 3 is no row: 1 cells"),
        ("text,text\na,b\n", "has several columns 'text'"),
    ],
)
def test_rows_that_do_not_fit_the_header_are_refused(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_pieces(Corpus(str(tmp_path / "t.csv"), "text")))


def test_a_csv_without_a_named_column_is_plain_text_and_a_line_says_so(tmp_path):
    corpus = Corpus(str(write(tmp_path / "t.csv")))
    assert next(iter(read_pieces(corpus))).text == "n,text"
    (note,) = reading.reading_notes(corpus, "line")
    assert "t.csv is read as plain text: --text_field=COLUMN reads a column" in note
    assert reading.kind_of("t.csv", None) != reading.kind_of("t.csv", "text")


def test_a_record_that_is_no_text_is_named_with_its_file_and_row(tmp_path):
    write(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="t.parquet, row 1 has no text in 'n', but 0"):
        list(read_pieces(Corpus(str(tmp_path / "t.parquet"), "n")))
    (tmp_path / "t.csv").write_bytes(b'text\ngood\n"bad "row\n')
    with pytest.raises(ValueError, match="t.csv, line 3 is no row"):
        list(read_pieces(Corpus(str(tmp_path / "t.csv"), "text")))
    (tmp_path / "t.csv").write_bytes(b"text\ngood\nb\xe4d\n")
    with pytest.raises(ValueError, match="t.csv, row 2 is not UTF-8"):
        list(read_pieces(Corpus(str(tmp_path / "t.csv"), "text")))


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".feather"])
def test_a_damaged_table_is_an_error_of_one_line(tmp_path, kind):
    path = write(tmp_path / f"t{kind}")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged after row"):
            list(read_pieces(Corpus(str(path), "text")))


def test_a_saved_dataset_is_read_and_its_splits_are_named(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    write(folder / "data-00000-of-00001.arrow")
    (folder / "dataset_info.json").write_text("{}")
    state = dict(_data_files=[dict(filename="data-00000-of-00001.arrow")])
    (folder / "state.json").write_text(json.dumps(state))
    assert [piece.text for piece in read_pieces(Corpus(str(folder)))] == LINES
    (folder / "data-00000-of-00001.arrow").rename(folder / "other")
    with pytest.raises(ValueError, match="lacks data-00000-of-00001.arrow: copy or save it again"):
        find_files(str(folder))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match="has the splits test, train: give one of these folders"):
        find_files(str(tmp_path))


def test_zstd_is_unpacked_and_read_from_any_place(tmp_path):
    text = "".join(f"line {i}, {np.random.default_rng(i).integers(10**9)}\n" for i in range(20_000))
    for name in ("t.txt.zst", "t.jsonl.zst"):
        content = text if "txt" in name else "".join(
            json.dumps(dict(text=line)) + "\n" for line in text.split("\n")
        )  # fmt: skip
        with pa.CompressedOutputStream(pa.OSFile(str(tmp_path / name), "wb"), "zstd") as file:
            file.write(content.encode())
        pieces = [piece.text for piece in read_pieces(Corpus(str(tmp_path / name)))]
        assert pieces == text.splitlines()
    with reading.open_text(str(tmp_path / "t.txt.zst")) as stream:
        assert stream.seek(0, 2) == len(text)
        for place in (100, 5, len(text) - 7):
            stream.seek(place)
            assert stream.read(5) == text.encode()[place : place + 5]


def test_a_table_is_tokenised_once_and_trains_like_its_lines(tmp_path):
    path, plain = write(tmp_path / "t.parquet"), tmp_path / "t.txt"
    plain.write_text("\n".join(LINES) + "\n")
    (tmp_path / "model").write_bytes(train_tokenizer(plain, "char"))
    tokenizer = load_tokenizer(tmp_path / "model")
    tokens = [cache.load_corpus(str(p), tokenizer, tmp_path / "cache") for p in (path, plain)]
    assert np.array_equal(tokens[0].ids, tokens[1].ids)
    assert tokens[0].key != tokens[1].key
    assert cache.load_corpus(str(path), tokenizer, tmp_path / "cache").key == tokens[0].key


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "t.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match="t.parquet is read with pyarrow: pip install pyarrow"):
        list(read_pieces(Corpus(str(path))))
