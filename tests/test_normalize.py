"""What tools.normalize writes."""

import sys

import pytest

from tools import normalize


def run(*words):
    normalize.main([*map(str, words)])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "flags, before, after",
    [
        (["--lower"], "The  KING\u2028 \n\n\u00c4 B \n", "the  king\u2028 \n\n\u00e4 b \n"),
        (
            ["--strip=symbols"],
            "a + b = \u20ac5, it's\n\n don't-- \u2603 \n",
            "a b 5, it's\n\ndon't--\n",
        ),
        (
            ["--strip=punctuation"],
            '(He said:) "Don\'t!"\nwell-known, 3.50\n',
            "He said Don't\nwell-known 3 50\n",
        ),
        (["--text8"], "The 2nd caf\u00e9,\n A\u212aB 10\n", "the two nd caf\na b one zero\n"),
        (["--lower", "--strip=symbols"], "A\u00a0\u00a0B\t C\n", "a b c\n"),
    ],
)
def test_a_text_is_written_in_a_simpler_form(tmp_path, flags, before, after):
    path = write(tmp_path / "a.txt", before)
    run(path, tmp_path / "out.txt", *flags)
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == after and path.read_text(
        encoding="utf-8"
    ) == before


def test_a_text_of_many_pieces_is_written_as_if_it_were_one(tmp_path, monkeypatch):
    text = "The king's  \u20ac boat,  = and \n\n a dog. \n" * 40
    path = write(tmp_path / "a.txt", text)
    run(path, tmp_path / "whole.txt", "--text8")
    monkeypatch.setattr("text.reading.PIECE_BYTES", 16)
    run(path, tmp_path / "parts.txt", "--text8")
    assert (
        (tmp_path / "parts.txt").read_text()
        == (tmp_path / "whole.txt").read_text()
        == "the king s boat and\n\na dog\n" * 40
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("in 1,234 days", "in one thousand, two hundred and thirty-four days"),
        ("12.5km or 7.", "twelve point five km or seven."),
        ("1,2,3", "one,two,three"),
        (
            "12345678901234567",
            "one two three four five six seven eight nine zero one two three four five six seven",
        ),
        ("x10.4.2021", "x ten point four.two thousand and twenty-one"),
    ],
)
def test_numbers_are_written_in_words(text, expected):
    pytest.importorskip("num2words")
    assert normalize.in_words(text) == expected


def test_numbers_of_an_unknown_language_or_without_the_package_are_an_error(monkeypatch):
    pytest.importorskip("num2words")
    assert normalize.in_words("21", "de") == "einundzwanzig"
    with pytest.raises(ValueError, match="no numbers for the language 'xx'"):
        normalize.in_words("21", "xx")
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(ValueError, match="pip install num2words"):
        normalize.in_words("21")


def test_no_file_is_written_over_and_an_error_leaves_none(tmp_path):
    path = write(tmp_path / "a.txt", "Text\n")
    for out in (path, tmp_path / "b.txt"):
        write(tmp_path / "b.txt", "mine")
        with pytest.raises(ValueError, match="exists already"):
            run(path, out, "--lower")
    assert path.read_text() == "Text\n" and (tmp_path / "b.txt").read_text() == "mine"
    (tmp_path / "c.txt").write_bytes(b"text\n" * 100_000 + b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        run(tmp_path / "c.txt", tmp_path / "d.txt", "--lower")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["a.txt", "b.txt"], "one or more of --lower"),
        (["a.txt", "b.txt.gz", "--lower"], "ends in .txt"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "text\n")
    with pytest.raises(ValueError, match=message):
        run(*words)
