"""What tools.stats says of a text."""

import json
import shlex

import numpy as np
import pytest

import train
from text import toy
from text.reading import PIECE_BYTES, Corpus
from tools import stats


def said_of(capsys, *words):
    """Run tools.stats -> what it prints."""
    stats.main([*map(str, words)])
    return capsys.readouterr().out


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
    assert (
        duplicates.share() == pytest.approx(0.5 * (1 + np.exp(-2)), abs=0.03)
        and len(duplicates.hashes) <= 1000
    )


def test_words_are_suggested_if_new_text_has_hardly_any_others(tmp_path):
    assert stats.suggest_tokenizer(write(tmp_path / "a.txt", toy.corpus(500)), "line")[0] == "word"
    numbers = "\n".join(f"the {n} kings" for n in range(500))
    assert stats.suggest_tokenizer(write(tmp_path / "b.txt", numbers), "line")[0] == "bpe"
    chinese = "\n".join(f"\u6f22\u5b57{chr(0x4E00 + n)}" for n in range(500))
    assert stats.suggest_tokenizer(write(tmp_path / "c.txt", chinese), "line")[0] == "bpe"


def test_words_are_suggested_for_few_words_even_if_new_text_has_some_others(tmp_path):
    """15 of 1,515 words occur once, as in greetings. Of more than 512 words, that is too many."""
    rare = "".join(f"{chr(ord('a') + n)}x\n" for n in range(15))
    few, many = (" ".join(f"w{n}" for n in range(N)) for N in (150, 750))
    assert (
        stats.suggest_tokenizer(write(tmp_path / "a.txt", f"{few}\n" * 10 + rare), "line")[0]
        == "word"
    )
    assert (
        stats.suggest_tokenizer(write(tmp_path / "b.txt", f"{many}\n" * 2 + rare), "line")[0]
        == "bpe"
    )


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
    assert (
        said
        == [
            ("blank lines: the first 300 lines are 100 paragraphs; "
            "if these are your examples, --example=paragraph")
        ]
        * is_said
    )
    assert stats.suggest_example(Corpus(str(tmp_path / "a.txt")), "paragraph") == []


def test_labels_are_not_part_of_the_text(capsys, tmp_path):
    path = write(
        tmp_path / "a.tsv",
        "".join(f"kind {n % 2}\t{line}\n" for n, line in enumerate(toy.corpus(300).splitlines())),
    )
    said = said_of(capsys, path, "--example=labelled")
    assert "--example=labelled --tokenizer=word" in said and "digits" not in said
    assert "2 labels: kind 0 150, kind 1 150" in said


def test_the_suggested_command_is_tried_without_writing_anything(tmp_path, monkeypatch, capsys):
    """A dry run says what would be trained."""
    texts = toy.corpus(400).splitlines()
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    path = write(tmp_path / "a.jsonl", lines)
    said = said_of(capsys, path, "--text_field=body").splitlines()[-1]
    words = shlex.split(said.removeprefix("suggested: python train.py ").split(" (with")[0])
    monkeypatch.chdir(tmp_path)
    tiny = [f"--cache_dir={tmp_path / 'cache'}", "-mdim=32", "-nl=1", "-nh=2", "--compile=off"]
    train.main([*words, *tiny, "--dry_run"])
    printed = capsys.readouterr().out
    assert "K = " in printed and "1 file, 400 examples" in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "cache"]


@pytest.mark.parametrize(
    "name, message",
    [("missing.txt", "no text file at missing.txt"), ("empty.txt", "has no text")],
)
def test_a_text_that_is_missing_or_empty_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty.txt", "\n")
    with pytest.raises(ValueError, match=message):
        stats.main([name])
