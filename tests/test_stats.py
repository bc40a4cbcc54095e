"""What tools.stats says of a text, and what tools.normalize writes."""

import json
import shlex
import sys

import numpy as np
import pytest

import train
from text import toy
from text.reading import PIECE_BYTES, Corpus
from tools import normalize, stats


@pytest.fixture
def command(capsys):
    """command("stats" or "normalize", *words) -> what it prints."""

    def command(name, *words):
        {"stats": stats, "normalize": normalize}[name].main([*map(str, words)])
        return capsys.readouterr().out

    return command


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_figures_of_a_text_are_counted(tmp_path):
    path = write(tmp_path / "a.txt", "ab \u0416!\n\nabc\nab \u0416!\nabc\n" + "\u6f225" * 3 + "\n")
    lengths, characters, duplicates, labels = stats.survey(Corpus(str(path)), "line")
    assert lengths == {5: 2, 3: 2, 6: 1} and duplicates.share() == 2 / 5
    assert characters["a"] == 4 and characters["\n"] == 0 and characters.total() == 22
    lines = stats.describe(Corpus(str(path)), "line", lengths, characters, duplicates, labels)
    assert "half up to 5, nine of ten up to 6, the longest 6" in lines[1] and "40.0%" in lines[-1]
    assert lines[4] == "scripts of the letters: latin 66.7%, cjk 20.0%, cyrillic 13.3%"


def test_an_example_longer_than_a_piece_is_one_example(tmp_path):
    path = write(tmp_path / "a.txt", ("word " * PIECE_BYTES + "\n") * 2)
    lengths, _, duplicates, _ = stats.survey(Corpus(str(path)), "line")
    assert lengths == {5 * PIECE_BYTES: 2} and duplicates.share() == 0.5


def test_the_share_of_duplicates_is_estimated_if_there_are_many_examples(monkeypatch):
    monkeypatch.setattr(stats, "MOST_HASHES", 1000)
    duplicates = stats.Duplicates()
    for n in np.random.default_rng(0).integers(10_000, size=20_000):
        duplicates.add(str(n))
    assert duplicates.share() == pytest.approx(0.5 * (1 + np.exp(-2)), abs=0.03) and len(duplicates.hashes) <= 1000


def test_words_are_suggested_if_new_text_has_hardly_any_others(tmp_path):
    assert stats.suggest_tokenizer(write(tmp_path / "a.txt", toy.corpus(500)), "line")[0] == "word"
    numbers = "\n".join(f"the {n} kings" for n in range(500))
    assert stats.suggest_tokenizer(write(tmp_path / "b.txt", numbers), "line")[0] == "bpe"
    chinese = "\n".join(f"\u6f22\u5b57{chr(0x4E00 + n)}" for n in range(500))
    assert stats.suggest_tokenizer(write(tmp_path / "c.txt", chinese), "line")[0] == "bpe"


def test_words_are_suggested_for_few_words_even_if_new_text_has_some_others(tmp_path):
    """15 of 1,515 words occur once, as in greetings. With more than 512 different words, that is too many."""
    rare = "".join(f"{chr(ord('a') + n)}x\n" for n in range(15))
    few, many = (" ".join(f"w{n}" for n in range(N)) for N in (150, 750))
    assert stats.suggest_tokenizer(write(tmp_path / "a.txt", f"{few}\n" * 10 + rare), "line")[0] == "word"
    assert stats.suggest_tokenizer(write(tmp_path / "b.txt", f"{many}\n" * 2 + rare), "line")[0] == "bpe"


@pytest.mark.parametrize(
    "text, is_said",
    [
        ("ANNA:\nYes.\nNo.\n\n" * 100, True),
        ("Yes.\n\nNo.\n\n" * 100, False),
        ("Yes.\nNo.\n" * 100, False),
        ("Yes.\n" * 100 + "\n" + "No.\n" * 100, False),
    ],
    ids=["plays", "a blank line after each line", "no blank lines", "one blank line"],
)
def test_paragraphs_are_suggested_if_blank_lines_separate_them(tmp_path, text, is_said):
    said = stats.suggest_example(Corpus(str(write(tmp_path / "a.txt", text))), "line")
    assert said == ["blank lines: the first 300 lines are 100 paragraphs; if these are your examples, --example=paragraph"] * is_said
    assert stats.suggest_example(Corpus(str(tmp_path / "a.txt")), "paragraph") == []


def test_labels_are_not_part_of_the_text(command, tmp_path):
    path = write(tmp_path / "a.tsv", "".join(f"kind {n % 2}\t{line}\n" for n, line in enumerate(toy.corpus(300).splitlines())))
    said = command("stats", path, "--example=labelled")
    assert "--example=labelled --tokenizer=word" in said and "digits" not in said
    assert "2 labels: kind 0 150, kind 1 150" in said


def test_the_suggested_command_is_tried_without_writing_anything(
    command, tmp_path, monkeypatch, capsys
):
    """A dry run says what would be trained."""
    texts = toy.corpus(400).splitlines()
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    path = write(tmp_path / "a.jsonl", lines)
    said = command("stats", path, "--text_field=body").splitlines()[-1]
    words = shlex.split(said.removeprefix("suggested: python train.py ").split(" (with")[0])
    monkeypatch.chdir(tmp_path)
    tiny = [f"--cache_dir={tmp_path / 'cache'}", "-mdim=32", "-nl=1", "-nh=2", "--compile=off"]
    train.main([*words, *tiny, "--dry_run"])
    printed = capsys.readouterr().out
    assert "K = " in printed and "1 file, 400 examples" in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "cache"]


# ---------------------------------------------------------------- normalize


@pytest.mark.parametrize(
    "flags, before, after",
    [
        (["--lower"], "The  KING\u2028 \n\n\u00c4 B \n", "the  king\u2028 \n\n\u00e4 b \n"),
        (["--strip=symbols"], "a + b = \u20ac5, it's\n\n don't-- \u2603 \n", "a b 5, it's\n\ndon't--\n"),
        (["--strip=punctuation"], "(He said:) \"Don't!\"\nwell-known, 3.50\n", "He said Don't\nwell-known 3 50\n"),
        (["--text8"], "The 2nd caf\u00e9,\n A\u212aB 10\n", "the two nd caf\na b one zero\n"),
        (["--lower", "--strip=symbols"], "A\u00a0\u00a0B\t C\n", "a b c\n"),
    ],
)
def test_a_text_is_written_in_a_simpler_form(command, tmp_path, flags, before, after):
    path = write(tmp_path / "a.txt", before)
    command("normalize", path, tmp_path / "out.txt", *flags)
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == after and path.read_text(encoding="utf-8") == before


def test_a_text_of_many_pieces_is_written_as_if_it_were_one(command, tmp_path, monkeypatch):
    text = "The king's  \u20ac boat,  = and \n\n a dog. \n" * 40
    path = write(tmp_path / "a.txt", text)
    command("normalize", path, tmp_path / "whole.txt", "--text8")
    monkeypatch.setattr("text.reading.PIECE_BYTES", 16)
    command("normalize", path, tmp_path / "parts.txt", "--text8")
    assert (tmp_path / "parts.txt").read_text() == (tmp_path / "whole.txt").read_text() == "the king s boat and\n\na dog\n" * 40


@pytest.mark.parametrize(
    "text, expected",
    [
        ("in 1,234 days", "in one thousand, two hundred and thirty-four days"),
        ("12.5km or 7.", "twelve point five km or seven."),
        ("1,2,3", "one,two,three"),
        ("12345678901234567", "one two three four five six seven eight nine zero one two three four five six seven"),
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


def test_no_file_is_written_over_and_an_error_leaves_none(command, tmp_path):
    path = write(tmp_path / "a.txt", "Text\n")
    for out in (path, tmp_path / "b.txt"):
        write(tmp_path / "b.txt", "mine")
        with pytest.raises(ValueError, match="exists already"):
            command("normalize", path, out, "--lower")
    assert path.read_text() == "Text\n" and (tmp_path / "b.txt").read_text() == "mine"
    (tmp_path / "c.txt").write_bytes(b"text\n" * 100_000 + b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        command("normalize", tmp_path / "c.txt", tmp_path / "d.txt", "--lower")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["normalize", "a.txt", "b.txt"], "one or more of --lower"),
        (["normalize", "a.txt", "b.txt.gz", "--lower"], "ends in .txt"),
        (["stats", "missing.txt"], "no text file at missing.txt"),
        (["stats", "empty.txt"], "has no text"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "text\n")
    write(tmp_path / "empty.txt", "\n")
    with pytest.raises(ValueError, match=message):
        command(*words)
