"""What data.py says of a text, and what it writes."""

import json
import re
import sys

import numpy as np
import pytest

import corpus
import toy
import train
from documents import Corpus
from text import PIECE_BYTES


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*words) -> what it prints. The network is tiny."""
    tiny = (32, 1, 2, 1e-3, 10, [0.99], 128, 256)
    monkeypatch.setattr(train, "PRESETS", {"laptop": tiny, "base": tiny})

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        corpus.main()
        return capsys.readouterr().out

    return command


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_figures_of_a_text_are_counted(tmp_path):
    path = write(tmp_path / "a.txt", "ab \u0416!\n\nabc\nab \u0416!\nabc\n" + "\u6f225" * 3 + "\n")
    lengths, characters, duplicates = corpus.survey(Corpus(str(path)), "line")
    assert lengths == {5: 2, 3: 2, 6: 1} and duplicates.share() == 2 / 5
    assert characters["a"] == 4 and characters["\n"] == 0 and characters.total() == 22
    lines = corpus.describe(Corpus(str(path)), "line", lengths, characters, duplicates)
    assert "half up to 5, nine of ten up to 6, the longest 6" in lines[1] and "40.0%" in lines[-1]
    assert lines[4] == "scripts of the letters: latin 66.7%, cjk 20.0%, cyrillic 13.3%"


def test_an_example_longer_than_a_piece_is_one_example(tmp_path):
    path = write(tmp_path / "a.txt", ("word " * PIECE_BYTES + "\n") * 2)
    lengths, _, duplicates = corpus.survey(Corpus(str(path)), "line")
    assert lengths == {5 * PIECE_BYTES: 2} and duplicates.share() == 0.5


def test_the_share_of_duplicates_is_estimated_if_there_are_many_examples(monkeypatch):
    monkeypatch.setattr(corpus, "MOST_HASHES", 1000)
    duplicates = corpus.Duplicates()
    for n in np.random.default_rng(0).integers(10_000, size=20_000):
        duplicates.add(str(n))
    assert duplicates.share() == pytest.approx(0.5 * (1 + np.exp(-2)), abs=0.03) and len(duplicates.hashes) <= 1000


def test_words_are_suggested_if_new_text_has_hardly_any_others(tmp_path):
    assert corpus.suggest_tokenizer(write(tmp_path / "a.txt", toy.corpus(500)), "line")[0] == "word"
    numbers = "\n".join(f"the {n} kings" for n in range(500))
    assert corpus.suggest_tokenizer(write(tmp_path / "b.txt", numbers), "line")[0] == "bpe"
    chinese = "\n".join(f"\u6f22\u5b57{chr(0x4E00 + n)}" for n in range(500))
    assert corpus.suggest_tokenizer(write(tmp_path / "c.txt", chinese), "line")[0] == "bpe"


def test_words_are_suggested_for_few_words_even_if_new_text_has_some_others(tmp_path):
    """15 of 1,515 words occur once, as in greetings. With more than 512 different words, that is too many."""
    rare = "".join(f"{chr(ord('a') + n)}x\n" for n in range(15))
    few, many = (" ".join(f"w{n}" for n in range(N)) for N in (150, 750))
    assert corpus.suggest_tokenizer(write(tmp_path / "a.txt", f"{few}\n" * 10 + rare), "line")[0] == "word"
    assert corpus.suggest_tokenizer(write(tmp_path / "b.txt", f"{many}\n" * 2 + rare), "line")[0] == "bpe"


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
    said = corpus.suggest_example(Corpus(str(write(tmp_path / "a.txt", text))), "line")
    assert said == ["blank lines: the first 300 lines are 100 paragraphs; if these are your examples, --example=paragraph"] * is_said
    assert corpus.suggest_example(Corpus(str(tmp_path / "a.txt")), "paragraph") == []


@pytest.mark.parametrize("seconds, length", [(0.001, "--minutes=10"), (1, "--epochs=10"), (100, "--minutes=60")])
def test_no_training_of_more_than_an_hour_is_suggested(command, tmp_path, monkeypatch, seconds, length):
    path = write(tmp_path / "a.txt", toy.corpus(6000))
    monkeypatch.setattr(corpus.switches, "warm_up", lambda *_: seconds)
    monkeypatch.setattr(corpus, "validation_seconds", lambda *_: 1e-3)
    assert f" {length} " in command("stats", path, f"--cache_dir={tmp_path / 'cache'}")


def test_labels_are_not_part_of_the_text(command, tmp_path):
    path = write(tmp_path / "a.tsv", "".join(f"kind {n % 2}\t{line}\n" for n, line in enumerate(toy.corpus(300).splitlines())))
    said = command("stats", path, "--example=labelled", f"--cache_dir={tmp_path / 'cache'}")
    assert "--example=labelled --tokenizer=word" in said and "digits" not in said


def test_the_suggested_command_trains_as_was_said(command, tmp_path, monkeypatch, capsys):
    """With the vocabulary, the rows, the batch and the steps that were said."""
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"body": line}) + "\n" for line in toy.corpus(400).splitlines()))
    said = command("stats", path, "--text_field=body", f"--cache_dir={tmp_path / 'cache'}")
    words = said.splitlines()[-1].removeprefix("suggested: python ").split()
    monkeypatch.setattr(sys, "argv", [*words[:-1], f"-mdir={tmp_path / 'run'}", "--epochs=1", f"--cache_dir={tmp_path / 'cache'}"])
    monkeypatch.setattr(sys, "argv", [word for word in sys.argv if "--minutes" not in word])
    train.main()
    printed = capsys.readouterr().out
    run = train.load(tmp_path / "run")[2]["args"]
    K, length, batch, steps = (
        int(re.search(pattern, said)[1].replace(",", ""))
        for pattern in (r"with ([\d,]+) tokens", r"rows of (\d+)", r"(\d+) per batch", r"10 epochs: ([\d,]+) steps")
    )
    assert f"K = {K}," in printed
    assert (run["sequence_length"], run["batch_size"]) == (length, batch)
    assert abs(10 * run["max_steps"] - steps) < 10


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
    monkeypatch.setattr("text.PIECE_BYTES", 16)
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
    assert corpus.in_words(text) == expected


def test_numbers_of_an_unknown_language_or_without_the_package_are_an_error(monkeypatch):
    pytest.importorskip("num2words")
    assert corpus.in_words("21", "de") == "einundzwanzig"
    with pytest.raises(ValueError, match="no numbers for the language 'xx'"):
        corpus.in_words("21", "xx")
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(ValueError, match="pip install num2words"):
        corpus.in_words("21")


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
        (["normalize", "a.txt"], "normalize takes a text, a new file"),
        (["normalize", "a.txt", "b.txt"], "one or more of --lower"),
        (["stats", "a.txt", "b.txt"], "stats takes a text only"),
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
