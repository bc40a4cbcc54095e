"""Prompts and their gaps become templates; what the tokenizer does not know is named."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from untrained import make_run

from sampling import odds, prompts
from sampling.prompts import (
    FREE,
    GAP,
    WORD_REST,
    WORD_START,
    allowed_at,
    allowed_tokens,
    make_template,
    parse_prompt,
    read_breaks,
    unknown_pieces,
    warn_unknown,
)
from text import cache
from text.tokenizer import Tokenizer
from training.checkpoint import load


def train_plain_tokenizer(kind, lines):
    """Train a tokenizer with SentencePiece's own defaults, which puts a space before every text."""
    model = io.BytesIO()
    options = dict(model_type=kind, vocab_size=60, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **options
    )
    return Tokenizer(model.getvalue())


def test_a_gap_with_a_count_takes_that_many_tokens(loaded):
    _, tokenizer, _ = loaded
    ((template, _),), has_gap = parse_prompt("the ___{3} sleeps", tokenizer, [0, 1])
    assert has_gap and template.count(GAP) == 3
    assert tokenizer.decode([token for token in template if token >= 0]).split() == [
        "the",
        "sleeps",
    ]


def test_a_gap_without_a_count_takes_as_many_tokens_as_a_word(run_dir, loaded):
    """Of 4 tokens here. A tokenizer of whole words has one.

    One of characters counts the space before the gap.
    """
    _, tokenizer, _ = loaded
    words_of_4 = [0, 0, 0, 0, 1]
    ((template, _),), _ = parse_prompt("the ___ sleeps", tokenizer, words_of_4)
    expected = {
        "bpe": [WORD_START] + [WORD_REST] * 3,
        "word": [WORD_START],
        "char": [WORD_REST] * 3,
    }[run_dir.name]
    assert [kind for kind in template if kind < 0] == expected


@pytest.mark.parametrize("kind, prompt", [("char", "the ___s"), ("bpe", "the ___, then")])
def test_text_right_after_a_gap_gets_no_space(kind, prompt):
    """Also with a tokenizer that puts a space before every text."""
    tokenizer = train_plain_tokenizer(
        kind, ["the king, then the queen s sleeps", "a king s hat, a queen"] * 20
    )
    ((template, _),), _ = parse_prompt(prompt, tokenizer, [0, 1])
    filled = [token if token >= 0 else tokenizer.encode("k")[-1] for token in template]
    assert tokenizer.decode(filled).split() == prompt.replace("___", "k").split()


def punctuated(tmp_path, kind):
    """A run of a corpus with punctuation."""
    return make_run(
        tmp_path / kind, kind, "The king is sweet.\nIs the old king sweet?\nNo, the king said." * 40
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
@pytest.mark.parametrize("prompt", ["The king is ___.", "___, the king said.", "Is the ___ sweet?"])
def test_a_gap_next_to_punctuation_works_with_every_tokenizer(tmp_path, kind, prompt):
    tokenizer = load(punctuated(tmp_path, kind))[1]
    for template, _ in parse_prompt(prompt, tokenizer, [0, 0, 1])[0]:
        letter = tokenizer.encode("k")[-1] if kind != "word" else tokenizer.encode(" king")[-1]
        text = tokenizer.decode([k if k >= 0 else letter for k in template])
        before, after = prompt.split("___")
        assert text.strip().startswith(before.strip()) and text.endswith(after)


def test_a_word_gap_after_a_space_is_filled_with_a_word_and_no_punctuation(tmp_path):
    tokenizer = load(punctuated(tmp_path, "word"))[1]
    comma, king = tokenizer.pieces.index("\u2581\u2040,"), tokenizer.pieces.index("\u2581king")
    allowed = allowed_tokens(tokenizer)
    assert not allowed[-WORD_START, comma] and allowed[-WORD_START, king]
    assert odds.find_ids(",", tokenizer) == [comma]


def test_text_that_cannot_be_joined_to_a_gap_is_refused():
    tokenizer = train_plain_tokenizer("word", ["the king s hat", "a queen s hat"] * 20)
    with pytest.raises(ValueError, match="cannot join 's'"):
        parse_prompt("king___{1}s", tokenizer, [0, 1])


def test_a_text_can_end_at_a_free_position_but_not_in_a_gap(loaded):
    _, tokenizer, _ = loaded
    if tokenizer.eos >= 0:
        may_end = allowed_tokens(tokenizer)[:, tokenizer.eos]
        assert may_end[-FREE] and not any(may_end[-kind] for kind in (GAP, WORD_START, WORD_REST))


def test_lengths_are_drawn_from_the_training_texts(loaded):
    _, tokenizer, run = loaded
    lengths = [len(make_template("", tokenizer, run, seed)) for seed in range(2000)]
    for length, share in ((5, 1 / 15), (6, 5 / 15), (7, 9 / 15)):
        assert lengths.count(length) / 2000 == pytest.approx(share, abs=0.04)


def test_words_are_counted_by_their_tokens_and_within_documents():
    starts_word = np.array([True, False, True])
    tokenizer = SimpleNamespace(pieces=["\u2581the", "s", "\u2581king"], starts_word=starts_word)
    ids = np.array([0, 1, 1, 2, 0, 0, 1, 2])  # "thess king the", "thes king"
    tokens = cache.Tokens(ids, np.array([0, 5, 8]), 0, 0, 0, "", tokenizer)
    assert tokens.count_word_lengths() == [0, 1, 1, 1]
    assert tokens.count_word_lengths(longest=2) == [0, 1, 1]


@pytest.mark.parametrize(
    "prompt, length, message",
    [
        ("the ___{40} sleeps", None, "trained on 32: shorten it"),
        ("the ___{0} sleeps", None, "gap of no tokens"),
        ("the old king sleeps", 3, "a text of 3 has none left to sample: raise --length"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(loaded, prompt, length, message):
    _, tokenizer, run = loaded
    with pytest.raises(ValueError, match=message):
        make_template(prompt, tokenizer, run, 0, length)


@pytest.mark.parametrize(
    "prompt",
    [
        "a ___{-1}",
        "a ___{} b",
        "____",
        "___{3",
        "___{two}",
        "___{2-}",
        "___{3-1}",
        "___{%s}" % ("9" * 5000),
    ],
)
def test_a_misspelled_gap_is_refused(loaded, prompt):
    _, tokenizer, run = loaded
    with pytest.raises(ValueError, match="a gap (is )?___"):
        make_template(prompt, tokenizer, run, seed=0)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("snake_case and a_b___c", None),  # None: the text is the prompt
        ("x9____y __init__", None),
        ("fill \\___ here", "fill ___ here"),
        ("\\_____", "_____"),
        ("\\___{3}", "___{3}"),
        ("\\\\___", "\\___"),
    ],
)
def test_underscores_in_a_word_or_after_a_backslash_are_text(prompt, text):
    assert not re.search(prompts.MISSPELLED, prompt)
    assert prompts.split_gaps(prompt) == ([text or prompt], [])


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ("a_b___c ___", ["a_b___c ", ""]),
        ("the ___s", ["the ", "s"]),
        ("\u5929___\u6c14", ["\u5929", "\u6c14"]),
        ("a___{1}b", ["a", "b"]),
        ("___{1}___", ["", "", ""]),
    ],
)
def test_other_underscores_are_gaps_also_between_letters_of_scripts_without_spaces(prompt, texts):
    assert prompts.split_gaps(prompt)[0] == texts


def test_underscores_that_are_text_reach_the_template():
    tokenizer = train_plain_tokenizer("char", ["a_b___c", "d ___"] * 20)
    ((template, _),), has_gap = parse_prompt(r"a_b___c \___", tokenizer, [0, 1])
    assert not has_gap and tokenizer.decode(template) == "a_b___c ___"


def test_a_prompt_that_is_not_unicode_is_refused(loaded):
    _, tokenizer, run = loaded
    with pytest.raises(ValueError, match="is not UTF-8: convert it"):
        make_template("caf\udce9", tokenizer, run, seed=0)


@pytest.mark.parametrize("prompt", ["the king\n___", "___\nsleeps", "anna\n___\nboat"])
def test_a_gap_next_to_a_line_break_is_a_word(poems, prompt):
    tokenizer = load(poems)[1]
    (template, _), *_ = parse_prompt(prompt, tokenizer, [0, 1])[0]
    kinds = [kind for kind in template if kind < 0]
    assert kinds == [WORD_START if poems.name == "word" else WORD_REST]
    text = tokenizer.decode([k if k >= 0 else tokenizer.encode("anna")[0] for k in template])
    before, after = prompt.split("___")
    assert text.startswith(before) and text.endswith(after)


def test_a_backslash_is_a_line_break_only_for_examples_of_several_lines():
    paragraph, line = ({"args": {"example": example}} for example in ("paragraph", "line"))
    assert (
        read_breaks(r"a\nb\\n\t", paragraph) == "a\nb\\n\\t"
        and read_breaks(r"a\nb", line) == r"a\nb"
    )


def test_a_word_gap_has_no_line_break_and_its_length_counts_no_line_break(poems):
    _, tokenizer, _ = load(poems)
    tokens = cache.load_corpus(poems / "text.txt", tokenizer, poems, example="paragraph")
    line_break = [k for k in range(len(tokenizer)) if "\n" in tokenizer.decode([k])]
    allowed = allowed_tokens(tokenizer)
    assert (
        not allowed[[-WORD_START, -WORD_REST]][:, line_break].any()
        and allowed[-GAP, line_break].any()
    )
    if (
        poems.name == "char"
    ):  # "the", at the end of a line or not, takes 4 tokens with the space before it
        assert [n for n, count in enumerate(tokens.count_word_lengths()) if count] == [
            4,
            5,
        ]


@pytest.mark.parametrize("prompt", ["zq the xj xj king \u5468", "\u5468\u672b the", "the zq"])
@pytest.mark.parametrize("plain", [False, True])
def test_unknown_tokens_read_as_the_prompt_or_as_nothing(loaded, plain, prompt):
    """Also if the tokenizer puts a space before every text, or neighbours are one token."""
    _, tokenizer, _ = loaded
    if plain:
        tokenizer = train_plain_tokenizer("bpe", ["the king sleeps", "a queen sleeps"] * 20)
    ids = tokenizer.encode(prompt)
    assert tokenizer.decode(ids, unknown_pieces(prompt, tokenizer)) == prompt
    without = tokenizer.decode(ids)
    assert "\u2047" not in without and "the" in without.split()


def test_a_text_ends_at_eos(loaded):
    _, tokenizer, _ = loaded
    the = tokenizer.encode("the")
    assert tokenizer.decode(tokenizer.add_marks(the)) == "the"
    if tokenizer.eos >= 0:
        assert tokenizer.decode(tokenizer.add_marks(the) + the) == "the"


def test_a_ban_does_not_touch_given_tokens(loaded):
    """The trace shows them as what the network is most certain of."""
    _, tokenizer, _ = loaded
    (allowed,) = allowed_at(torch.tensor([[5, FREE]]), tokenizer, banned=(5,))
    assert allowed[0].all() and not allowed[1, 5]


def test_bans_that_leave_no_token_are_refused(loaded):
    _, tokenizer, _ = loaded
    with pytest.raises(ValueError, match="--ban leaves no token to draw"):
        allowed_at(torch.tensor([[FREE]]), tokenizer, banned=range(len(tokenizer)))


@pytest.mark.parametrize(
    "text, prompt, line",
    [
        (
            "The lamp they like is sweet.",
            "the ___ is sweet, zq",
            "'the' (did you mean 'The'?), 'sweet,' ('sweet.'), 'zq'",
        ),
        (
            "THE lamp lump THE tHE",
            "limp The",
            "'limp' (did you mean 'lump' or 'lamp'?), 'The' ('THE')",
        ),
        ("lamp", "b1 b2 b3 b4 b5 b6 b7 b1", "'b1', 'b2', 'b3', 'b4', 'b5' and 2 more"),
    ],
)
def test_a_warning_names_unknown_words_and_the_nearest_known_ones(capsys, text, prompt, line):
    tokenizer = train_plain_tokenizer("word", [text] * 9)
    warn_unknown([prompt, text, prompt], tokenizer)
    assert capsys.readouterr().err == f"the tokenizer does not know {line}\n"


def test_a_warning_names_unknown_characters_one_by_one(capsys):
    """bpe without bytes puts neighbours into one unknown token."""
    warn_unknown(
        ["Zqueen ___ \u5468\u672b"], train_plain_tokenizer("bpe", ["a queen sleeps, z"] * 20)
    )
    assert (
        capsys.readouterr().err
        == "the tokenizer does not know 'Z' (did you mean 'z'?), '\u5468', '\u672b'\n"
    )
